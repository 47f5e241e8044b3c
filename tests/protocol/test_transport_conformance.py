"""What every transport promises of its streams, checked on both: the in-process one and the real one."""

from __future__ import annotations

import asyncio

import pytest

from protocol.errors import (
    StreamClosedError,
)
from protocol.ids import PeerId
from protocol.transport import Stream
from tests.protocol.worlds import ECHO, World, ask, echo, serve, write_until_it_fails


async def test_bytes_travel_both_ways(world: World) -> None:
    a, b = await world.pair()
    await serve(b, ECHO, echo)
    async with await a.open(b.peer_id, ECHO) as stream:
        assert await ask(stream, b"hello") == b"hello"
        big = bytes(range(256)) * 12_000
        assert await ask(stream, big) == big


async def test_memoryviews_are_written_whole(world: World) -> None:
    a, b = await world.pair()
    await serve(b, ECHO, echo)
    async with await a.open(b.peer_id, ECHO) as stream:
        await stream.write((8).to_bytes(4, "big"))
        await stream.write(memoryview(b"01234567").cast("Q"))
        assert await stream.read_exactly(8) == b"01234567"


async def test_reading_into_a_buffer_mixes_with_reading_bytes(world: World) -> None:
    a, b = await world.pair()
    data = bytes(range(256)) * 4096

    async def talk(stream: Stream) -> None:
        await stream.write(b"head")
        await stream.write(data)
        await stream.write(b"tail")
        await stream.read_exactly(1)

    await serve(b, ECHO, talk)
    async with await a.open(b.peer_id, ECHO) as stream:
        buffer = memoryview(bytearray(len(data) + 2))
        before_bytes = a.traffic.received_bytes
        assert await stream.read_exactly(2) == b"he"
        await stream.read_into(buffer[: len(data) // 2])
        await stream.read_into(buffer[0:0])
        await stream.read_into(buffer[len(data) // 2 :])
        assert buffer == b"ad" + data
        assert await stream.read_exactly(4) == b"tail"
        assert a.traffic.received_bytes - before_bytes == len(data) + 8
        await stream.write(b"x")


async def test_reading_into_a_buffer_ends_with_the_stream(world: World) -> None:
    a, b = await world.pair()

    async def talk(stream: Stream) -> None:
        await stream.write(b"12345")

    await serve(b, ECHO, talk)
    async with await a.open(b.peer_id, ECHO) as stream:
        with pytest.raises(StreamClosedError):
            await stream.read_into(memoryview(bytearray(6)))
        with pytest.raises(StreamClosedError):
            await stream.read_into(memoryview(bytearray(1)))
    with pytest.raises(StreamClosedError):
        await stream.read_into(memoryview(bytearray(1)))


async def test_both_ends_know_who_the_other_is(world: World) -> None:
    a, b = await world.pair()
    seen: list[PeerId] = []

    async def note(stream: Stream) -> None:
        seen.append(stream.peer)
        await stream.write(b"!")

    await serve(b, ECHO, note)
    async with await a.open(b.peer_id, ECHO) as stream:
        await stream.read_exactly(1)
        assert stream.peer == b.peer_id
    assert seen == [a.peer_id]


async def test_bytes_written_before_close_arrive_then_the_stream_ends(world: World) -> None:
    a, b = await world.pair()

    async def greet(stream: Stream) -> None:
        await stream.write(bytes(300_000))

    await serve(b, ECHO, greet)
    async with await a.open(b.peer_id, ECHO) as stream:
        assert await stream.read_exactly(300_000) == bytes(300_000)
        with pytest.raises(StreamClosedError):
            await stream.read_exactly(1)


async def test_a_half_read_message_is_an_error(world: World) -> None:
    a, b = await world.pair()

    async def stutter(stream: Stream) -> None:
        await stream.write(b"abc")

    await serve(b, ECHO, stutter)
    async with await a.open(b.peer_id, ECHO) as stream:
        with pytest.raises(StreamClosedError):
            await stream.read_exactly(4)


async def test_a_closed_stream_refuses_everything_and_closes_again(world: World) -> None:
    a, b = await world.pair()
    await serve(b, ECHO, echo)
    stream = await a.open(b.peer_id, ECHO)
    await stream.close()
    await stream.close()
    with pytest.raises(StreamClosedError):
        await stream.read_exactly(1)
    with pytest.raises(StreamClosedError):
        await stream.write(b"x")


async def test_writing_to_a_peer_that_closed_fails_soon(world: World) -> None:
    a, b = await world.pair()

    async def hang_up(stream: Stream) -> None:
        pass

    await serve(b, ECHO, hang_up)
    async with await a.open(b.peer_id, ECHO) as stream:
        with pytest.raises(StreamClosedError):
            await write_until_it_fails(stream)


async def test_a_reader_that_waits_is_woken_by_the_end(world: World) -> None:
    a, b = await world.pair()
    ended = asyncio.Event()

    async def wait(stream: Stream) -> None:
        try:
            await stream.read_exactly(1)
        except StreamClosedError:
            ended.set()
            raise

    await serve(b, ECHO, wait)
    stream = await a.open(b.peer_id, ECHO)
    await stream.close()
    async with asyncio.timeout(10):
        await ended.wait()


async def test_a_writer_waits_for_a_slow_reader(world: World) -> None:
    a, b = await world.pair()
    read_on = asyncio.Event()
    num_bytes = 64 << 20

    async def dawdle(stream: Stream) -> None:
        await read_on.wait()
        for _ in range(64):
            await stream.read_exactly(1 << 20)
        await stream.write(b"k")

    await serve(b, ECHO, dawdle)
    async with await a.open(b.peer_id, ECHO) as stream, asyncio.TaskGroup() as group:
        writing = group.create_task(stream.write(bytes(num_bytes)))
        done, _ = await asyncio.wait((writing,), timeout=0.5)
        assert not done
        read_on.set()
        assert await stream.read_exactly(1) == b"k"
        assert writing.done()
