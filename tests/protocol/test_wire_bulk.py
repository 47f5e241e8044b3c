"""Bulk data, over links with virtual time."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable

import psutil
import pytest

from protocol import wire
from protocol.errors import DeadlineError, StreamClosedError
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport, run_virtual
from protocol.transport import Stream
from tests.protocol.byte_stream import A, B, ByteStream, T


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
