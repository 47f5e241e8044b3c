"""Every event of the node in words, or left out on purpose."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import node
from node.messages import ENDED_BY, describe, topic
from protocol.records import ExchangeNote
from tests.protocol.samples import identity

SILENT = {"step", "checkpoint_saved", "log", "serving", "summary"}
"""For programs, or shown in another way."""

VALUES: dict[str, Any] = {
    "agreed": True,
    "addresses": ["/ip4/192.0.2.1/tcp/4001/p2p/x"],
    "bytes": 1000,
    "distance": 0.00023,
    "donors": 3,
    "fallback": True,
    "loss": 3.25,
    "meetings": 7,
    "members": 4,
    "missing": {},
    "outcome": "averaged",
    "own": 3,
    "own_numel": 0,
    "partner": identity(1).peer_id,
    "peers": 3,
    "seconds": 12.5,
    "swarm": 9,
    "tokens": 1_234_567,
    "tokens_per_s": 12_345.6,
    "training": 2,
    "val_loss": 3.5,
}
NUMBERS = ("round", "swarm_round", "step", "sequences", "threads", "sequences_per_step")


def emitted() -> dict[str, set[str]]:
    """Event names and their fields, read from the source of the node."""
    found: dict[str, set[str]] = {}
    for path in Path(node.__path__[0]).glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "emit":
                names = (
                    [arg.value for arg in ast.walk(call.args[0]) if isinstance(arg, ast.Constant)] if call.args else []
                )
                for name in names:
                    found.setdefault(str(name), set()).update(k.arg for k in call.keywords if k.arg is not None)
    return found


def fields_for(event: str, names: set[str]) -> dict[str, Any]:
    if event == "exchange":
        names = set(ExchangeNote.model_fields)
    if event == "group_round":
        names = {"round", "outcome", "members", "missing", "own_numel", "seconds"}
    if event == "swarm":
        names = {"peers", "training", "round", "val_loss", "tokens_per_s"}
    return {name: VALUES.get(name, 7 if name in NUMBERS else f"the {name}") for name in names}


def test_the_source_is_read() -> None:
    assert {"exchange", "checkpoint_failed", "alone", "company", "disk_error"} <= emitted().keys()


@pytest.mark.parametrize("event", sorted(emitted()))
def test_every_event_has_a_sentence_or_none_on_purpose(event: str) -> None:
    message = describe(event, fields_for(event, emitted()[event]) | {"level": "warning"})
    assert (message is None) == (event in SILENT)
    if message is not None:
        assert message.text
        assert "{" not in message.text
        assert "\n" not in message.text


@pytest.mark.parametrize("outcome", ["averaged", "clipped", "refused", "alone", "timeout", "lost"])
@pytest.mark.parametrize("partner", [None, identity(1).peer_id])
def test_every_outcome_has_words(outcome: str, partner: str | None) -> None:
    message = describe("exchange", {"round": 3, "partner": partner, "outcome": outcome, "seconds": 0.26})
    assert message is not None
    assert message.text.startswith("Round 3: ")


@pytest.mark.parametrize(
    "event", ["checkpoint_failed", "checkpoint_damaged", "disk_error", "swarm_unreachable", "alone"]
)
def test_what_the_owner_must_know_is_a_warning(event: str) -> None:
    fields = emitted()[event] | ({"path", "reason"} if event == "disk_error" else set())
    message = describe(event, fields_for(event, fields))
    assert message is not None
    assert message.level == "warning"


def test_lasting_warnings_are_warnings_and_end_with_events_that_exist() -> None:
    names = emitted().keys()
    assert set(ENDED_BY) <= names
    assert set(ENDED_BY.values()) <= names


def test_two_files_are_two_topics() -> None:
    assert topic("disk_error", {"path": "a"}) != topic("disk_error", {"path": "b"})
    assert topic("disk_error", {"path": "a"}) == topic("disk_error", {"path": "a", "reason": "full"})


def test_strangers_text_is_made_printable() -> None:
    message = describe("state_refused", {"round": 1, "reason": "a\x1b[2Jb\u202ec\nd"})
    assert message is not None
    assert message.text == "Refused a state of round 1: a·[2Jb·c d"


def test_ids_are_shown_by_their_first_digits() -> None:
    message = describe("disk_error", {"path": f"/home/x/runs/{'ab' * 32}/events.jsonl", "reason": "full"})
    assert message is not None
    assert message.text.startswith("Cannot write /home/x/runs/abababababab…/events.jsonl: full")


def test_logged_errors_are_shown_and_logged_warnings_are_not() -> None:
    assert describe("log", {"level": "warning", "source": "x", "text": "a peer lied"}) is None
    message = describe("log", {"level": "error", "source": "x", "text": "p2pd does not come back"})
    assert message is not None
    assert message.level == "warning"


def test_the_end_of_a_run_in_words() -> None:
    fields = {"partner": identity(1).peer_id, "outcome": "clipped", "seconds": 0.26, "distance": None}
    meeting = describe("consolidation", fields)
    assert meeting is not None
    assert meeting.text.startswith("Final averaging: averaged with")
    for agreed, words in [(True, "All peers hold one model"), (False, "The final averaging ended before")]:
        end = describe("consolidated", {"agreed": agreed, "meetings": 7, "distance": 0.00023, "loss": 3.25})
        assert end is not None
        assert end.text.startswith(words)
        assert "0.0002" in end.text


def test_a_group_round_in_words() -> None:
    fields: dict[str, object] = {"round": 3, "outcome": "averaged", "members": 4, "seconds": 1.23}
    whole = describe("group_round", fields | {"missing": {}, "own_numel": 0})
    part = describe("group_round", fields | {"outcome": "partial", "missing": {"a": "late"}, "own_numel": 5000})
    alone = describe(
        "group_round", fields | {"outcome": "alone", "members": 1, "missing": {"a": "late"}, "own_numel": 0}
    )
    assert [told and told.text for told in (whole, part, alone)] == [
        "Round 3: mean of 4 peers in 1.2 s",
        "Round 3: mean of 4 peers in 1.2 s; 1 missing; 5,000 values are our own, their mean was lost",
        "Round 3: no group came together; stepped alone",
    ]
