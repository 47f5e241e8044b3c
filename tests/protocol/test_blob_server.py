"""The serving side of blobs against askers that do not keep the rules."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from protocol import blob_server
from protocol.blob_server import BLOB_PROTOCOL, BlobReply, BlobRequest
from protocol.errors import StreamClosedError
from protocol.wire import Value, pack, read_message, write_frame, write_message
from tests.protocol.blob_swarm import (
    BLOB,
    JOINER,
    NUM_LEAVES,
    A,
    now_s,
    swarm,
    virtual,
)


@virtual
async def test_a_path_or_a_leaf_that_is_none_is_a_violation_of_the_asker(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        donor = await net.donor(A)
        (tmp_path / "secret").write_bytes(b"secret")
        requests: list[tuple[str, Value]] = [
            ("../secret", 0),
            ("/" + "a" * 63, None),
            (BLOB + "\n", None),
            (BLOB.upper(), None),
            (BLOB, -1),
            (BLOB, NUM_LEAVES),
            (BLOB, 2**40),
            (BLOB, True),
            (BLOB, "0"),
        ]
        for count, (blob, leaf) in enumerate(requests, start=1):
            async with await net.joiner.open(A, BLOB_PROTOCOL) as stream:
                await write_frame(stream, pack({"blob": blob, "leaf": leaf}))
                with pytest.raises(StreamClosedError):
                    await stream.read_exactly(1)
            assert donor.incoming.violations[JOINER] == count
        assert donor.incoming.num_bugs == 0


@virtual
async def test_streams_are_few_per_peer_and_the_rest_is_told_so(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        async with AsyncExitStack() as held:
            for _ in range(blob_server.MAX_STREAMS_PER_PEER):
                await held.enter_async_context(await net.joiner.open(A, BLOB_PROTOCOL))
            async with await net.joiner.open(A, BLOB_PROTOCOL) as stream:
                assert (await read_message(stream, BlobReply)).status == "busy"
            task = asyncio.ensure_future(net.fetch(donors=lambda: [A]))
            await asyncio.sleep(3)
            assert not task.done()
        await task
        assert net.store.has(BLOB)


@virtual
async def test_an_asker_that_never_reads_loses_its_stream(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        async with AsyncExitStack() as held:
            for _ in range(blob_server.MAX_STREAMS_PER_PEER):
                stream = await held.enter_async_context(await net.joiner.open(A, BLOB_PROTOCOL))
                for index in (0, 1, 2, 3, 4, 0, 1, 2, 3, 4):
                    await write_message(stream, BlobRequest(blob=BLOB, leaf=index))
            await asyncio.sleep(90)
            async with await net.joiner.open(A, BLOB_PROTOCOL) as stream:
                await write_message(stream, BlobRequest(blob=BLOB, leaf=None))
                assert (await read_message(stream, BlobReply)).status == "ok"


@virtual
async def test_a_silent_asker_loses_its_stream(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        async with await net.joiner.open(A, BLOB_PROTOCOL) as stream:
            with pytest.raises(StreamClosedError):
                await stream.read_exactly(1)
            assert now_s() == pytest.approx(blob_server.IDLE_TIMEOUT_S, abs=1)
