"""What a person reads at the end of a demo, with either transport."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import node.simulation.demo
from node.demo import run_demo, show_result
from node.demo_settings import DemoOptions

RESULT: dict[str, Any] = {
    "val_loss_start": 6.95,
    "val_loss_end": 3.475,
    "peers": 3,
    "exchanges_ok": 36,
    "tokens": 1_382_400,
    "bytes_sent": 99_513_360,
    "seconds": 124.0,
    "checkpoint": "demo-run/exported",
}


def test_the_outcome_is_one_sentence() -> None:
    text = io.StringIO()
    show_result(Console(file=text, width=400), RESULT)
    assert text.getvalue() == (
        "Held-out loss 6.950 → 3.475 (−50 %) with 3 peers, 36 exchanges, 1,382,400 tokens, 100 MB sent, 124 s. "
        "Exported to demo-run/exported.\n"
    )


def test_the_memory_demo_says_what_came_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node.simulation.demo, "run_simulated_demo", lambda options, folder: RESULT)
    options = DemoOptions(peers=3, rounds=1, seed=0, folder=tmp_path / "demo", memory=True)
    assert run_demo(options) == RESULT
    assert "Held-out loss 6.950 → 3.475" in capsys.readouterr().err
