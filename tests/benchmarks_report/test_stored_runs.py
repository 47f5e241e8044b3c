"""A sweep that was stopped goes on, and does not begin again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.stored_runs import run_missing, stored


@dataclass(frozen=True)
class Cell:
    method: str
    seed: int


def seed_as_loss(cell: Cell) -> dict[str, Any]:
    return {"loss": float(cell.seed), "seconds": 0.0}


def test_only_what_is_missing_is_run_and_every_result_is_stored(tmp_path: Path) -> None:
    sweep = {f"key-{seed}": Cell("full", seed) for seed in range(3)}
    path = tmp_path / "new" / "runs.jsonl"
    known: dict[str, dict[str, Any]] = {"key-0": {"loss": 7.0}}
    run_missing(sweep, path, run=seed_as_loss, jobs=1, known=known)
    cells = {"key-1": {"method": "full", "seed": 1}, "key-2": {"method": "full", "seed": 2}}
    assert {key: line["cell"] for key, line in stored(path).items()} == cells
    assert {key: line["loss"] for key, line in known.items()} == {"key-0": 7.0, "key-1": 1.0, "key-2": 2.0}
    before = path.read_bytes()
    run_missing(sweep, path, run=seed_as_loss, jobs=1, known=stored(path) | {"key-0": known["key-0"]})
    assert path.read_bytes() == before
