"""The reader under a libp2p stream, without p2pd: pieces of any size, at any time, into a buffer of the caller's."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest

from protocol.libp2p_stream import READ_BUFFER_BYTES, DirectReader


def buffer(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))


async def test_bytes_that_came_before_and_after_the_call_are_all_there() -> None:
    reader, out = DirectReader(), buffer(6)
    reader.feed_data(b"01")
    reading = asyncio.ensure_future(reader.read_into(out))
    await asyncio.sleep(0)
    reader.feed_data(b"23")
    reader.feed_data(b"45678")
    await reading
    assert bytes(out) == b"012345"
    assert await reader.readexactly(3) == b"678"


@pytest.mark.parametrize("seed", range(20))
async def test_any_cut_of_the_bytes_and_of_the_reads_gives_the_same(seed: int) -> None:
    chance = random.Random(seed)
    data = chance.randbytes(5000)
    reader, out = DirectReader(), buffer(len(data))

    async def feed() -> None:
        start = 0
        while start < len(data):
            end = start + chance.randint(1, 400)
            reader.feed_data(data[start:end])
            start = end
            for _ in range(chance.randint(0, 2)):
                await asyncio.sleep(0)
        reader.feed_eof()

    feeding = asyncio.ensure_future(feed())
    start = 0
    while start < len(data):
        size = min(chance.randint(1, 700), len(data) - start)
        if chance.random() < 0.3:
            out[start : start + size] = await reader.readexactly(size)
        else:
            await reader.read_into(out[start : start + size])
        start += size
    await feeding
    assert out == data
    with pytest.raises(asyncio.IncompleteReadError):
        await reader.read_into(buffer(1))


async def test_an_end_in_the_middle_says_how_much_is_missing() -> None:
    reader = DirectReader()
    reading = asyncio.ensure_future(reader.read_into(buffer(10)))
    await asyncio.sleep(0)
    reader.feed_data(b"0123")
    reader.feed_eof()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await reading
    assert caught.value.expected == 6


async def test_a_broken_connection_wakes_the_reader() -> None:
    reader = DirectReader()
    reading = asyncio.ensure_future(reader.read_into(buffer(10)))
    await asyncio.sleep(0)
    reader.set_exception(ConnectionResetError("gone"))
    with pytest.raises(ConnectionResetError):
        await reading


async def test_a_cancelled_read_lets_go_of_the_buffer() -> None:
    reader, out = DirectReader(), buffer(4)
    reading = asyncio.ensure_future(reader.read_into(out))
    await asyncio.sleep(0)
    reader.feed_data(b"ab")
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    reader.feed_data(b"cd")
    assert bytes(out) == b"ab\0\0"


async def test_nothing_is_lost_when_the_buffer_was_full_and_reading_paused() -> None:
    loop, reader = asyncio.get_running_loop(), DirectReader()
    ours, theirs = socket.socketpair()
    transport, _ = await loop.create_connection(lambda: asyncio.StreamReaderProtocol(reader), sock=ours)
    data = random.Random(0).randbytes(8 * READ_BUFFER_BYTES)
    sending = asyncio.ensure_future(asyncio.to_thread(theirs.sendall, data))
    paused = asyncio.Event()
    transport.pause_reading, pause = paused.set, transport.pause_reading  # type: ignore[method-assign]
    await paused.wait()
    pause()
    out = buffer(len(data))
    await reader.read_into(out)
    await sending
    assert out == data
    transport.close()
    theirs.close()
