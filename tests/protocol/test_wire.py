"""Bounded msgpack, frames, messages and bulk data, against honest and hostile bytes."""

from __future__ import annotations

import asyncio
import math
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal, TypeVar

import msgpack
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from protocol import wire
from protocol.errors import DeadlineError, ProtocolError, StreamClosedError
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport, run_virtual
from protocol.transport import Stream
from protocol.wire import Message, Value, pack, scan, unpack
from tests.protocol.samples import damaged, identity

T = TypeVar("T")
fuzz = settings(max_examples=200, deadline=None, derandomize=True, database=None)
A, B = identity(1).peer_id, identity(2).peer_id


class ByteStream(Stream):
    """A stream whose other end has already sent everything and gone; what is written is kept."""

    def __init__(self, data: bytes = b"") -> None:
        self.peer = B
        self.data = data
        self.written = b""
        self.largest_read_bytes = 0

    async def read_exactly(self, num_bytes: int) -> bytes:
        self.largest_read_bytes = max(self.largest_read_bytes, num_bytes)
        if num_bytes > len(self.data):
            raise StreamClosedError("the stream ended")
        head, self.data = self.data[:num_bytes], self.data[num_bytes:]
        return head

    async def write(self, data: bytes | memoryview) -> None:
        self.written += bytes(data)

    async def close(self) -> None:
        pass


class Greeting(Message):
    kind: Literal["hello", "bye"]
    number: Annotated[int, Field(ge=0, lt=2**32)]
    share: float = 0.5
    digest: Annotated[bytes, Field(max_length=32)] = b""
    names: Annotated[list[str], Field(max_length=4)] = Field(default=[])


def attempt(action: Callable[[], T]) -> T | ProtocolError:
    """What `action` returns or, if that is how it ends, its ProtocolError."""
    try:
        return action()
    except ProtocolError as error:
        return error


# ---- values ----------------------------------------------------------------------------------------------------------------

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


# ---- frames and messages ---------------------------------------------------------------------------------------------------


async def test_frames_go_round() -> None:
    stream = ByteStream()
    for payload in (b"", b"x", bytes(70_000)):
        await wire.write_frame(stream, payload)
    reader = ByteStream(stream.written)
    assert [await wire.read_frame(reader, max_bytes=70_000) for _ in range(3)] == [b"", b"x", bytes(70_000)]


async def test_a_frame_is_capped_before_it_is_read() -> None:
    stream = ByteStream(b"\xff\xff\xff\xff" + bytes(100))
    with pytest.raises(ProtocolError, match="allowed") as error:
        await wire.read_frame(stream, max_bytes=100)
    assert error.value.peer == B
    assert stream.largest_read_bytes == 4
    assert len(stream.data) == 100


@fuzz
@given(data=st.binary(max_size=64) | damaged(b"\x00\x00\x00\x20" + bytes(32)))
def test_any_stream_is_a_frame_or_a_known_error(data: bytes) -> None:
    stream = ByteStream(data)
    try:
        payload = asyncio.run(wire.read_frame(stream, max_bytes=48))
    except (ProtocolError, StreamClosedError):
        assert stream.largest_read_bytes <= 48
    else:
        assert data.startswith(len(payload).to_bytes(4) + payload)


GREETING = Greeting(kind="hello", number=7, share=1.5, digest=b"\0\xff", names=["a", "b"])


async def test_messages_go_round() -> None:
    stream = ByteStream()
    await wire.write_message(stream, GREETING)
    await wire.write_message(stream, Greeting(kind="bye", number=0))
    reader = ByteStream(stream.written)
    assert await wire.read_message(reader, Greeting) == GREETING
    assert await wire.read_message(reader, Greeting) == Greeting(kind="bye", number=0)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"kind": "hello"},
        {"kind": "howdy", "number": 1},
        {"kind": "hello", "number": "1"},
        {"kind": "hello", "number": True},
        {"kind": "hello", "number": 1.0},
        {"kind": "hello", "number": 2**32},
        {"kind": "hello", "number": 1, "share": math.nan},
        {"kind": "hello", "number": 1, "share": math.inf},
        {"kind": "hello", "number": 1, "digest": "text"},
        {"kind": "hello", "number": 1, "digest": bytes(33)},
        {"kind": "hello", "number": 1, "names": ["a"] * 5},
        {"kind": "hello", "number": 1, "names": "abc"},
        {"kind": "hello", "number": 1, "\x1b[2J<script>": 1},
    ],
)
async def test_a_message_is_checked_strictly_and_blamed_on_its_sender(value: Value) -> None:
    stream = ByteStream()
    await wire.write_frame(stream, pack(value))
    with pytest.raises(ProtocolError, match="bad Greeting") as error:
        await wire.read_message(ByteStream(stream.written), Greeting)
    assert error.value.peer == B
    assert error.value.reason.isprintable()


async def test_bad_msgpack_in_a_message_is_blamed_on_its_sender() -> None:
    with pytest.raises(ProtocolError, match="never starts") as error:
        await wire.read_message(ByteStream(b"\0\0\0\1\xc1"), Greeting)
    assert error.value.peer == B


@fuzz
@given(data=damaged(wire.encode_message(GREETING)))
def test_any_damage_to_a_message_is_a_message_or_a_protocol_error(data: bytes) -> None:
    message = attempt(lambda: wire.decode_message(data, Greeting, peer=B))
    if isinstance(message, ProtocolError):
        assert message.peer == B
        assert message.reason.isprintable()
    else:
        assert wire.decode_message(wire.encode_message(message), Greeting) == message


# ---- bulk data, over links with virtual time -------------------------------------------------------------------------------


def over_link(
    link: LinkSpec, serve: Callable[[Stream], Awaitable[None]], call: Callable[[Stream], Awaitable[T]]
) -> tuple[T, float]:
    """Run `call` on a stream to a peer that runs `serve`; returns its result and the virtual seconds it took."""

    async def scenario() -> tuple[T, float]:
        network = MemoryNetwork(link=link)
        async with MemoryTransport(network, A) as near, MemoryTransport(network, B) as far:
            far.handle("/llm-node/test/1", serve)
            async with await near.open(PeerId(B), "/llm-node/test/1") as stream:
                started_s = asyncio.get_running_loop().time()
                result = await call(stream)
                return result, asyncio.get_running_loop().time() - started_s

    return run_virtual(scenario())


BULK = bytes(range(256)) * 12_288 + b"tail"  # three chunks and a bit


def test_bulk_goes_over_in_chunks() -> None:
    async def serve(stream: Stream) -> None:
        await wire.write_bulk(stream, memoryview(BULK))

    received, seconds = over_link(
        LinkSpec(latency_s=0.1, bytes_per_s=1e6), serve, lambda s: wire.read_bulk(s, len(BULK))
    )
    assert received == BULK
    assert seconds == pytest.approx(0.1 + len(BULK) / 1e6, rel=0.1)


def test_bulk_of_any_item_size_is_written_as_bytes() -> None:
    stream = ByteStream()
    asyncio.run(wire.write_bulk(stream, memoryview(bytearray(16)).cast("I")))
    asyncio.run(wire.write_bulk(stream, b""))
    assert stream.written == bytes(16)
    assert asyncio.run(wire.read_bulk(ByteStream(), 0)) == b""


def test_a_slow_link_above_the_minimum_is_fine() -> None:
    async def serve(stream: Stream) -> None:
        await wire.write_bulk(stream, BULK)

    received, _ = over_link(LinkSpec(bytes_per_s=20_000), serve, lambda stream: wire.read_bulk(stream, len(BULK)))
    assert received == BULK


def test_a_trickle_ends_at_the_chunk_s_deadline() -> None:
    """8 kbit/s: far below the minimum, though something arrives all the time."""

    async def serve(stream: Stream) -> None:
        await stream.write(BULK)

    async def call(stream: Stream) -> None:
        with pytest.raises(DeadlineError, match="too slowly"):
            await wire.read_bulk(stream, len(BULK))

    _, seconds = over_link(LinkSpec(bytes_per_s=1000), serve, call)
    assert seconds == pytest.approx(wire.CHUNK_TIMEOUT_S + wire.CHUNK_BYTES / wire.MIN_BYTES_PER_S)


def test_a_reader_that_stops_reading_ends_the_writer_at_the_chunk_s_deadline() -> None:
    async def serve(stream: Stream) -> None:
        await asyncio.Event().wait()

    async def call(stream: Stream) -> None:
        with pytest.raises(DeadlineError, match="too long to read"):
            await wire.write_bulk(stream, BULK * 4)

    _, seconds = over_link(LinkSpec(), serve, call)
    assert seconds == pytest.approx(wire.CHUNK_TIMEOUT_S + wire.CHUNK_BYTES / wire.MIN_BYTES_PER_S)


def test_bulk_that_ends_early_is_a_closed_stream() -> None:
    async def serve(stream: Stream) -> None:
        await wire.write_bulk(stream, BULK[:-1])

    async def call(stream: Stream) -> None:
        with pytest.raises(StreamClosedError):
            await wire.read_bulk(stream, len(BULK))

    over_link(LinkSpec(), serve, call)


async def test_a_large_claim_costs_no_memory_before_it_arrives() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(StreamClosedError):
            await wire.read_bulk(ByteStream(), 1 << 40)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


class TestReadingIntoABuffer:
    def test_each_chunk_is_handed_over_when_it_is_there(self) -> None:
        async def serve(stream: Stream) -> None:
            await wire.write_bulk(stream, BULK)

        out, seen = memoryview(bytearray(len(BULK))), []

        async def call(stream: Stream) -> None:
            await wire.read_bulk_into(stream, out, take_chunk=lambda chunk: seen.append(bytes(chunk)))

        over_link(LinkSpec(latency_s=0.1, bytes_per_s=1e6), serve, call)
        assert out == BULK
        assert b"".join(seen) == BULK
        assert [len(chunk) for chunk in seen] == [wire.CHUNK_BYTES] * 3 + [4]

    def test_a_trickle_ends_at_the_chunk_s_deadline(self) -> None:
        async def serve(stream: Stream) -> None:
            await stream.write(BULK)

        async def call(stream: Stream) -> None:
            with pytest.raises(DeadlineError, match="0 of 3145732 bytes"):
                await wire.read_bulk_into(stream, memoryview(bytearray(len(BULK))))

        _, seconds = over_link(LinkSpec(bytes_per_s=1000), serve, call)
        assert seconds == pytest.approx(wire.CHUNK_TIMEOUT_S + wire.CHUNK_BYTES / wire.MIN_BYTES_PER_S)

    def test_a_large_buffer_takes_no_memory_before_it_is_written_to(self) -> None:
        process = psutil.Process()
        before_bytes = process.memory_info().rss
        buffer = wire.bulk_buffer(1 << 30)
        buffer[5 << 20] = 1
        assert process.memory_info().rss - before_bytes < 64 << 20
        assert (buffer.nbytes, buffer[0], buffer[5 << 20]) == (1 << 30, 0, 1)
        assert wire.bulk_buffer(0).nbytes == 0
