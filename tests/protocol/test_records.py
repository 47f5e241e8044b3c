"""Peer records: bounded fields, signed bytes, and whatever else a stranger may send."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.directory import pack_record, unpack_record
from protocol.errors import ProtocolError
from protocol.ids import RunId
from protocol.records import MAX_RECORD_BYTES
from protocol.wire import Value, encode_message, pack
from tests.protocol.samples import RUN, damaged, identity, largest_record, record

A, B = identity(1), identity(2)
PACKED = pack_record(record(A, name="a name", tokens_per_s=12.5), A)


def test_records_go_round() -> None:
    for original in (record(A), record(A, state="leaving", val_loss=2.5, val_round=3), largest_record(A)):
        assert unpack_record(pack_record(original, A), run=RunId(RUN)) == original


def test_the_largest_record_fits() -> None:
    assert len(pack_record(largest_record(A), A)) <= MAX_RECORD_BYTES


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": -1},
        {"sequence": 2**63},
        {"sequence": 1.0},
        {"sequence": True},
        {"sequence": "1"},
        {"run": "AB" * 32},
        {"run": "ab" * 31},
        {"run": "ab" * 32 + "\n"},
        {"peer": "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"},
        {"role": "king"},
        {"state": ""},
        {"name": "x" * 33},
        {"name": b"x"},
        {"addresses": ["/x"] * 9},
        {"addresses": ["x" * 257]},
        {"addresses": "/x"},
        {"tokens_per_s": math.nan},
        {"tokens_per_s": math.inf},
        {"tokens_per_s": -1.0},
        {"train_loss": math.nan},
        {"val_loss": -0.1},
        {"sent_at_s": 1e12},
        {"recent": [{"round": 1, "partner": None, "outcome": "alone", "seconds": 1.0}] * 5},
        {"recent": [{"round": 1, "partner": None, "outcome": "won", "seconds": 1.0}]},
        {"recent": [{"round": 1, "partner": None, "outcome": "alone", "seconds": 1.0, "more": 1}]},
        {"snapshots": [{"round": 1, "root": "../../etc/passwd", "size_bytes": 1}]},
        {"anything": 1},
    ],
)
def test_fields_are_bounded_here_and_on_the_wire(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        record(A, **changes)
    body = pack(record(A).model_dump() | changes)
    with pytest.raises(ProtocolError) as error:
        unpack_record(A.sign("record", body) + body, run=None)
    assert error.value.reason.isprintable()


def test_signature_run_and_length_are_checked() -> None:
    body = encode_message(record(A))
    with pytest.raises(ProtocolError, match="not signed"):
        unpack_record(B.sign("record", body) + body, run=RunId(RUN))
    with pytest.raises(ProtocolError, match="not signed"):
        unpack_record(A.sign("manifest", body) + body, run=RunId(RUN))
    with pytest.raises(ProtocolError, match="another run"):
        unpack_record(PACKED, run=RunId("cd" * 32))
    assert unpack_record(PACKED, run=None).run == RUN
    with pytest.raises(ProtocolError, match="longer than"):
        unpack_record(PACKED + bytes(MAX_RECORD_BYTES), run=None)
    with pytest.raises(ProtocolError):
        unpack_record(PACKED[:64], run=None)


def test_a_peer_id_that_is_no_key_is_refused() -> None:
    fields: dict[str, Value] = record(A).model_dump() | {"peer": "12D3KooW" + "z" * 44}
    body = pack(fields)
    with pytest.raises(ProtocolError, match="not signed"):
        unpack_record(A.sign("record", body) + body, run=None)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=damaged(PACKED) | st.binary(max_size=300))
def test_no_damaged_record_passes(data: bytes) -> None:
    if data == PACKED:
        return
    with pytest.raises(ProtocolError) as error:
        unpack_record(data, run=None)
    assert error.value.reason.isprintable()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(body=damaged(PACKED[64:]))
def test_a_damaged_body_with_a_good_signature_is_a_record_or_a_protocol_error(body: bytes) -> None:
    """The signer itself may be hostile."""
    try:
        read = unpack_record(A.sign("record", body) + body, run=None)
    except ProtocolError:
        return
    assert unpack_record(pack_record(read, A), run=None) == read
