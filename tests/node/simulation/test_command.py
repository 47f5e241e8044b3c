"""`llm-node simulate`: tables, JSON, plots, and refusals before anything is simulated."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from node.cli import app
from node.simulation import run
from node.simulation.plots import write_plots
from protocol.errors import UserError

SCENARIO = """
name = "small"
[swarm]
peers = 4
rounds = 15
parameters = 8
heartbeat_s = 5.0
[links]
latency_s = 0.01
[sync]
inner_steps = 5
round_target_s = 5.0
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(SCENARIO)
    return tmp_path / "small.toml"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_a_table_for_people(path: Path) -> None:
    result = invoke(path)
    assert result.exit_code == 0, result.exception
    for words in ("small: 4 peers", "p95", "exchanges that averaged", "replica spread", "look-ups per peer and round"):
        assert words in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.startswith("│ 14")]
    assert len(rows) == 1, "the last round is shown even when not all are"


def test_json_and_files_say_the_same_and_repeat(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    printed = json.loads(invoke(path, "--json", "--out", tmp_path / "one").stdout)
    assert printed == json.loads((tmp_path / "one" / "result.json").read_text())
    (tmp_path / "two").mkdir()
    write_plots(printed, tmp_path / "two")
    for name in ("rounds.png", "rounds.svg", "exchanges.png", "exchanges.svg"):
        data = (tmp_path / "one" / name).read_bytes()
        assert data[:4] in (b"\x89PNG", b"<?xm")
        assert data == (tmp_path / "two" / name).read_bytes()


def test_a_name_is_no_mathematics(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path.write_text(path.read_text().replace('"small"', r"'worth $\frac$ of it'"))
    assert invoke(path, "--out", tmp_path / "out", "--set", "swarm.rounds=2").exit_code == 0
    assert "frac" in (tmp_path / "out" / "rounds.svg").read_text()


def test_without_matplotlib_plots_are_refused_at_once_and_tables_work(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert invoke(path, "--json").exit_code == 0
    monkeypatch.setattr(run, "simulate", lambda *_: pytest.fail("simulated before it could plot"))
    result = invoke(path, "--out", tmp_path / "out")
    assert isinstance(result.exception, UserError)
    assert "llm-node[simulate]" in str(result.exception)
    assert "\n" not in str(result.exception)


def test_an_impossible_folder_is_refused_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "simulate", lambda *_: pytest.fail("simulated before it could write"))
    (path.parent / "taken" / "result.json").mkdir(parents=True)
    for folder in (path / "below a file", path.parent / "taken"):
        result = invoke(path, "--out", folder)
        assert isinstance(result.exception, UserError)
        assert "choose another folder" in str(result.exception)


def test_a_bad_scenario_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[swarm]\npeers = 0\nrounds = 1\n")
    result = invoke(tmp_path / "bad.toml")
    assert isinstance(result.exception, UserError)
    assert result.stdout == ""


def test_settings_that_diverge_are_one_line(path: Path) -> None:
    """Nesterov with β = 2 and optima that every round reaches: 2 is beyond 2(1 + α)/(1 + 2α)."""
    wild = ["sync.algorithm=diloco", "sync.beta=2.0", "training.lr=0.9", "swarm.rounds=300", "swarm.peers=2"]
    result = invoke(path, *(text for setting in wild for text in ("--set", setting)))
    assert isinstance(result.exception, UserError)
    assert "grow beyond all bounds" in str(result.exception)
    assert "\n" not in str(result.exception)


STAGED = (
    SCENARIO
    + """
[model]
preset = "100m"
sequence_tokens = 256
[pipeline]
stages = 2
microbatches = 1
microbatch_sequences = 1
[[links.classes]]
share = 1.0
up_bytes_per_s = 1e6
down_bytes_per_s = 1e6
"""
)


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    (tmp_path / "staged.toml").write_text(STAGED.replace("rounds = 15", "rounds = 1"))
    return tmp_path / "staged.toml"


def test_a_table_of_stages(staged: Path) -> None:
    result = invoke(staged)
    assert result.exit_code == 0, result.exception
    for words in ("2 of 2 stages", "10 sent, 10 returned", "tokens per virtual second", "peers per stage", "busy"):
        assert words in result.stdout


def test_settings_change_the_scenario_and_plots_are_drawn(staged: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    result = json.loads(
        invoke(staged, "--json", "--out", out, "--set", "pipeline.stages=3", "--set", "swarm.peers=6").stdout
    )
    assert (result["stages"], result["peers"]) == (3, 6)
    assert result == json.loads((out / "result.json").read_text())
    for name in ("iterations", "peers", "stages"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (out / f"{name}.svg").read_bytes()[:5] == b"<?xml"


@pytest.mark.parametrize(
    ("setting", "telling"),
    [
        ("pipeline.stages=5", "needs as many peers, and swarm.peers is 4"),
        ("pipeline.stages=1", "set pipeline.stages above 1, or remove it"),
        ("pipeline.stages=many", "pipeline.stages"),
        ("pipeline.skip_ratio=0.9", "pipeline.skip_ratio"),
        ("pipeline.codec=zip", "pipeline.codec"),
        ("model.preset=tiny", "no model preset 'tiny'; choose one of 1m"),
        ("model.sequence_tokens=4096", "lower it"),
        ("model.forward_s=0", "model.forward_s"),
        ("name.first=1", "name"),
        ("stages=4", "not of the form section.field=value"),
    ],
)
def test_bad_settings_are_refused_in_one_line(staged: Path, setting: str, telling: str) -> None:
    result = invoke(staged, "--set", setting)
    assert isinstance(result.exception, UserError)
    assert telling in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.stdout == ""
