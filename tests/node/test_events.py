"""Events on disk and to listeners, and log records as events."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from node import events as events_module
from node.events import EventLog, LogToEvents, describe_record


def heard(log: EventLog) -> list[tuple[str, dict[str, Any]]]:
    """What a listener hears from now on."""
    said: list[tuple[str, dict[str, Any]]] = []
    log.listen(lambda event, fields: said.append((event, fields)))
    return said


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_reach_listeners_and_disk(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    said = heard(log)
    log.emit("step", round=3, loss=1.5)
    assert said == [("step", {"round": 3, "loss": 1.5})]
    (line,) = lines(tmp_path / "events.jsonl")
    assert {key: line[key] for key in ("event", "round", "loss")} == {"event": "step", "round": 3, "loss": 1.5}
    assert line["t"] > 1.7e9


def test_a_full_disk_is_told_once_and_never_raised(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = EventLog(folder / "events.jsonl")  # the folder is not there: every write fails
    said = heard(log)
    for number in range(3):
        log.emit("step", number=number)
    assert [event for event, _ in said] == ["step", "disk_error", "step", "step"]
    assert said[1][1]["path"] == str(folder / "events.jsonl")
    assert said[1][1]["reason"] == "No such file or directory"
    folder.mkdir()
    log.emit("step", number=3)
    log.emit("step", number=4)
    assert [event for event, _ in said[4:]] == ["step", "disk_recovered", "step"]
    assert [line["number"] for line in lines(folder / "events.jsonl")] == [3, 4]


def test_the_log_is_rotated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_LOG_BYTES", 200)
    log = EventLog(tmp_path / "events.jsonl")
    for number in range(100):
        log.emit("step", number=number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "events.old"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 600
    assert lines(tmp_path / "events.jsonl")[-1]["number"] == 99


def test_log_records_become_events_in_one_line() -> None:
    log = EventLog()
    said = heard(log)
    logger = logging.Logger("some.library")
    logger.addHandler(LogToEvents(log))
    logger.info("not worth a word")
    logger.warning("two\nlines from %s", "afar", extra={"peer": "x"})
    try:
        raise ValueError("a\nbug")
    except ValueError:
        logger.exception("it failed")
    assert said == [
        ("log", {"level": "warning", "source": "some.library", "text": "two lines from afar peer=x"}),
        ("log", {"level": "error", "source": "some.library", "text": "it failed ValueError: a bug"}),
    ]


def test_a_plain_record_has_no_extras() -> None:
    record = logging.Logger("x").makeRecord("x", logging.WARNING, "f", 1, "hello %d", (7,), None)
    assert describe_record(record) == "hello 7"
