"""Bounded msgpack, against honest and hostile bytes."""

from __future__ import annotations

import time
import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import wire
from protocol.errors import ProtocolError
from protocol.wire import Value, pack, scan, unpack
from tests.protocol.byte_stream import attempt, fuzz
from tests.protocol.samples import damaged

leaves: st.SearchStrategy[Value] = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300)
)


def nested(inner: st.SearchStrategy[Value]) -> st.SearchStrategy[Value]:
    return st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=8), inner, max_size=20)


values = leaves | nested(leaves) | nested(nested(leaves))


@fuzz
@given(value=values)
def test_unpack_inverts_pack(value: Value) -> None:
    assert unpack(pack(value)) == value


@fuzz
@given(data=values.map(pack).flatmap(damaged) | st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_protocol_error(data: bytes) -> None:
    value = attempt(lambda: unpack(data))
    if isinstance(value, ProtocolError):
        assert value.reason.isprintable()
    else:
        assert msgpack.unpackb(data, raw=False) == value or "nan" in repr(value)


@fuzz
@given(data=values.map(pack).flatmap(damaged))
def test_what_the_scanner_accepts_only_utf8_can_spoil(data: bytes) -> None:
    if attempt(lambda: scan(data, max_depth=4, max_items=1024, allowed_ext=frozenset())) is None:
        msgpack.unpackb(data, raw=True, strict_map_key=False)


def extension(code: int, payload: bytes) -> bytes:
    packed: bytes = msgpack.packb(msgpack.ExtType(code, payload))
    return packed


def nested_extensions(depth: int) -> bytes:
    data = b"\xc0"
    for _ in range(depth):
        data = extension(0x40, data)
    return data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends early"),
        (b"\x00\x00", "left over"),
        (b"\xc1", "never starts"),
        (b"\x91" * 5 + b"\x00", "too deeply"),
        (b"\x91" * 60_000 + b"\x00", "too deeply"),
        (b"\x81\xa1a" * 5 + b"\x00", "too deeply"),
        (b"\xdd\xff\xff\xff\xff", "too many"),
        (b"\xdf\xff\xff\xff\xff", "too many"),
        (pack([0] * 1025), "too many"),
        (pack({str(i): 0 for i in range(1025)}), "too many"),
        (b"\x93\x00\x00", "ends early"),
        (b"\xdc\x00", "ends early"),
        (b"\xc6\xff\xff\xff\xffabc", "ends early"),
        (b"\xdb\x00\x00\x00\x04abc", "ends early"),
        (b"\xcb\x00", "ends early"),
        (b"\x81\x01\x02", "not a string"),
        (b"\x81\xc4\x01a\x02", "not a string"),
        (b"\x81\x90\x02", "not a string"),
        (b"\x82\xa1a\x00\xa1a\x01", "same key twice"),
        (b"\x82\xa1a\x00\xd9\x01a\x01", "same key twice"),  # two spellings of one key
        (b"\xa1\xff", "UTF-8"),
        (b"\xa3\xed\xa0\x80", "UTF-8"),  # a lone surrogate
        (extension(0x40, b"\xc0"), "extension"),
        (b"\xd6\xff" + bytes(4), "extension"),  # a timestamp, which msgpack would decode by itself
        (b"\xd4", "ends early"),
        (bytes(wire.MAX_HEADER_BYTES + 1), "longer than"),
    ],
)
def test_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        unpack(data)


def test_bounds_are_inclusive() -> None:
    assert unpack(b"\x91" * 4 + b"\x00") == [[[[0]]]]
    assert unpack(pack([0] * 1024)) == [0] * 1024
    assert unpack(pack("x" * 60_000)) == "x" * 60_000
    assert unpack(b"\x01", max_depth=0) == 1
    with pytest.raises(ProtocolError, match="too deeply"):
        unpack(b"\x90", max_depth=0)


def test_extensions_are_scanned_through_and_count_as_depth() -> None:
    allowed = frozenset({0x40, 0x50})
    scan(nested_extensions(4), max_depth=4, max_items=8, allowed_ext=allowed)
    dictionary = extension(0x50, pack([8, 1.0, [[b"subkey", b"value", 1.0]]]))  # as the DHT sends its tables
    scan(dictionary, max_depth=4, max_items=8, allowed_ext=allowed)
    scan(pack([0, 1]) and extension(0x40, pack([0, 1])), max_depth=4, max_items=8, allowed_ext=allowed)
    for bad, reason in [
        (nested_extensions(5), "too deeply"),
        (nested_extensions(300), "too deeply"),
        (extension(0x41, b"\xc0"), "not allowed"),
        (extension(0x40, b""), "ends early"),
        (extension(0x40, b"\xc0\xc0"), "left over"),
        (extension(0x40, b"\x92\xc0") + b"\xc0", "ends early"),  # must not reach out of its payload
        (b"\xd4\x40\xd9\xc0\xc0", "ends early"),
        (extension(0x40, pack([0] * 9)), "too many"),
        (extension(0x40, b"\x81\x00\x00"), "not a string"),
        (b"\x92" + extension(0x40, b"\x92\x00") + b"\x00", "ends early"),
    ]:
        with pytest.raises(ProtocolError, match=reason):
            scan(bad, max_depth=4, max_items=8, allowed_ext=allowed)


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff" * 1000,
        b"\xc9\xff\xff\xff\xff\x40" * 1000,
        b"\x91" * wire.MAX_HEADER_BYTES,
        pack([[{}] * 1000] * 60),
        pack([[[]] * 1000] * 60),
        pack([[None] * 1000] * 60),
    ],
)
def test_memory_and_time_are_bounded(data: bytes) -> None:
    tracemalloc.start()
    try:
        started_s = time.process_time()
        attempt(lambda: unpack(data))
        seconds = time.process_time() - started_s
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes <= 4 * len(data) + (16 << 20)
    assert seconds < 2.0  # tracing costs a multiple; a quadratic scanner would need minutes
