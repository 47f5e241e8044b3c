"""A status document from a stranger is checked before anything looks at it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstrap.document import MAX_DOCUMENT_BYTES, encode_document, parse_document
from protocol.errors import ProtocolError
from tests.bootstrap.samples import document_of, record

GOOD = encode_document(document_of(record(1, val_loss=3.0, val_round=7), record(2)))


def _changed(path: list[str | int], value: Any) -> bytes:
    document = json.loads(GOOD)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        GOOD[:-1],
        GOOD + b"x",
        b" " * (MAX_DOCUMENT_BYTES + 1),
        _changed(["format"], 2),
        _changed(["surprise"], 1),
        _changed(["swarm", "tokens"], -1),
        _changed(["swarm", "tokens_per_s"], float("nan")),
        _changed(["swarm", "tokens_per_s"], float("inf")),
        _changed(["swarm", "round"], "8"),
        _changed(["peers", 0, "peer"], "../../etc/passwd"),
        _changed(["peers", 0, "state"], "dancing"),
        _changed(["peers", 0, "name"], "x" * 300),
        _changed(["warnings"], ["x"] * 100),
        _changed(["val_loss"], [[1, 2.0]]),
    ],
)
def test_anything_else_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_document(data)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_escape_sequences_in_texts_are_replaced() -> None:
    assert parse_document(_changed(["peers", 0, "name"], "\x1b]0;owned\x07"))["peers"][0]["name"] == "·]0;owned·"


def test_an_error_never_repeats_the_sender_s_text() -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_document(_changed(["swarm", "\x1b[2J evil"], 1))
    assert "evil" not in str(caught.value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(GOOD)),
)
def test_mutated_and_truncated_documents(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    try:
        parsed = parse_document(bytes(data[:length]))
    except ProtocolError:
        return
    assert parse_document(encode_document(parsed)) == parsed
