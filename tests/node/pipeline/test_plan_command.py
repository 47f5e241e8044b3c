"""`llm-node plan`: tables, JSON, pictures, and refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from node.cli import app
from node.pipeline.case import Case
from node.pipeline.plan import Plan
from node.pipeline.rules import violations
from protocol.errors import UserError
from tests.node.pipeline.cases import drawn_document


def run(folder: Path, document: Any, *options: str) -> Result:
    """`llm-node plan`; errors come out as they were raised."""
    (folder / "case.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return CliRunner().invoke(app, ["plan", str(folder / "case.json"), "--seconds", "0.3", *options])


def test_table_plan_and_picture(tmp_path: Path) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    result = run(tmp_path, drawn_document(1), "--out", str(out), "--gantt", str(picture))
    assert result.exit_code == 0, result.output
    assert "bound with this partition" in result.output
    assert violations(Case.model_validate(drawn_document(1)), Plan.from_json(json.loads(out.read_text()))) == []
    assert picture.read_text().startswith("<?xml")


def test_json(tmp_path: Path) -> None:
    result = run(tmp_path, drawn_document(1), "--json", "--full")
    answer = json.loads(result.output)
    assert answer["iteration_s"] >= answer["bound_s"] > 0
    assert all(len(each["path"]) == len(answer["plan"]["partition"]) for each in answer["plan"]["microbatches"])


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("[", "is not JSON"),
        ("3", "Input should be"),
        (drawn_document(1) | {"path_length": 9}, "path_length must not exceed the number of stages"),
        (drawn_document(1) | {"stage_sizes": [1, 1]}, "add up to num_nodes"),
        (drawn_document(1) | {"forward_s": [1.0]}, "forward_s must hold a positive number for each"),
        (drawn_document(1) | {"link_s": [[1.0]]}, "link_s must be"),
        (drawn_document(1) | {"slots_per_node": 0}, "slots_per_node must be at least 1"),
        (drawn_document(1) | {"slots_per_node": [1, 2]}, "slots_per_node has 2 entries"),
        (drawn_document(1) | {"uplink_s": 1}, "uplink_s"),
        (drawn_document(1) | {"partition": [[0]]}, "partition must hold every node once"),
        (drawn_document(1) | {"backward_multiplier": float("nan")}, "finite"),
        (drawn_document(1) | {"max_visits": 1}, "raise max_visits"),
        (drawn_document(1) | {"max_visits": 0}, "max_visits must be at least 1"),
        (drawn_document(1) | {"num_nodes": 10**9}, "less than or equal to 4096"),
    ],
)
def test_wrong_cases_get_one_line(tmp_path: Path, document: Any, reason: str) -> None:
    result = run(tmp_path, document)
    assert isinstance(result.exception, UserError)
    assert reason in str(result.exception)
    assert "\n" not in str(result.exception)


def test_wrong_options_get_one_line_before_any_search(tmp_path: Path) -> None:
    assert "must end with .svg or .png" in str(run(tmp_path, drawn_document(1), "--gantt", "a.pdf").exception)
    nowhere = str(tmp_path / "no" / "plan.json")
    assert "there is no such folder" in str(run(tmp_path, drawn_document(1), "--out", nowhere).exception)
    (tmp_path / "folder.svg").mkdir()
    for option in ("--out", "--gantt"):
        result = run(tmp_path, drawn_document(1), option, str(tmp_path / "folder.svg"))
        assert isinstance(result.exception, UserError)
        assert "folder.svg: Is a directory; choose another file" in str(result.exception)
    missing = CliRunner().invoke(app, ["plan", str(tmp_path / "none.json")])
    assert "No such file" in str(missing.exception)


def test_what_to_plan_must_be_said_once(tmp_path: Path) -> None:
    for arguments in (["plan"], ["plan", str(tmp_path / "case.json"), "--peer", "/ip4/127.0.0.1/tcp/1"]):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, UserError)
        assert "give a case file to plan, or --peer" in str(result.exception)


@pytest.mark.parametrize("options", [["--full"], ["--out", "plan.json"], ["--gantt", "plan.svg"]])
def test_what_is_for_case_files_is_not_ignored_for_a_live_swarm(options: list[str]) -> None:
    result = CliRunner().invoke(app, ["plan", "--peer", "/ip4/127.0.0.1/tcp/1", *options])
    assert isinstance(result.exception, UserError)
    assert "are for case files" in str(result.exception)


def test_without_matplotlib_the_picture_is_refused_and_its_option_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run(tmp_path, drawn_document(1), "--gantt", str(tmp_path / "plan.svg"))
    assert isinstance(result.exception, UserError)
    assert str(result.exception).endswith("or leave out --gantt")
