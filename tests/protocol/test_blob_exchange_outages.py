"""Fetching blobs while donors go away and come back: what has arrived is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from protocol.blob_exchange import PATIENCE_S, BlobUnavailableError
from protocol.blobs import BlobStore
from protocol.errors import StreamClosedError
from protocol.ids import PeerId
from protocol.memory import LinkSpec
from protocol.merkle import LEAF_BYTES
from protocol.transport import Stream
from tests.protocol.blob_swarm import (
    BLOB,
    DATA,
    JOINER,
    NUM_LEAVES,
    A,
    B,
    honest_leaf,
    now_s,
    scripted,
    swarm,
    virtual,
)


@virtual
async def test_a_donor_that_crashes_midway_is_replaced(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        await net.donor(B)
        net.network.set_link(B, JOINER, LinkSpec(latency_s=0.01, bytes_per_s=1e6))

        def on_progress(done_bytes: int, size_bytes: int) -> None:
            if done_bytes >= 2 * LEAF_BYTES and A in net.network.transports:
                net.network.crash(A)

        report = await net.fetch(A, B, on_progress=on_progress)
        assert net.store.read(BLOB) == DATA
        assert set(report.received_bytes) == {A, B}


@virtual
async def test_a_fetch_resumes_after_a_crash_and_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        halfway = asyncio.Event()
        task = asyncio.ensure_future(
            net.fetch(A, on_progress=lambda done, size: halfway.set() if done >= 3 * LEAF_BYTES else None)
        )
        await halfway.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        partial = net.store.partial_path(BLOB)
        with partial.open("r+b") as file:  # and the crash tore one of the leaves that were written
            file.seek(LEAF_BYTES)
            file.write(bytes(4096))
        net.store = BlobStore(net.store.root)
        received_bytes = net.joiner.traffic.received_bytes
        report = await net.fetch(A)
        assert net.store.read(BLOB) == DATA
        assert 2 * LEAF_BYTES < report.received_bytes[A] <= (NUM_LEAVES - 2) * LEAF_BYTES
        assert net.joiner.traffic.received_bytes - received_bytes < report.received_bytes[A] + 2000


@virtual
async def test_no_donor_left_keeps_what_has_arrived(tmp_path: Path) -> None:
    async def two_leaves(stream: Stream, index: int) -> None:
        if index >= 2:
            raise StreamClosedError("no more")
        await honest_leaf(stream, index)

    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_leaf=two_leaves))
        with pytest.raises(BlobUnavailableError):
            await net.fetch(A)
        await net.donor(B)
        report = await net.fetch(B)
        assert report.received_bytes == {B: len(DATA) - 2 * LEAF_BYTES}


@virtual
async def test_donors_may_appear_later(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        known: list[PeerId] = []
        task = asyncio.ensure_future(net.fetch(donors=lambda: known))
        await asyncio.sleep(20)
        await net.donor(A)
        known.append(A)
        report = await task
        assert report.received_bytes == {A: len(DATA)}
        assert now_s() < 22


@virtual
async def test_a_donor_that_is_away_for_a_while_is_tried_again(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        task = asyncio.ensure_future(net.fetch(donors=lambda: [A]))
        await asyncio.sleep(15)
        await net.donor(A)
        await task
        assert net.store.has(BLOB)


@virtual
async def test_patience_ends(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        with pytest.raises(BlobUnavailableError, match="nobody was asked"):
            await net.fetch(donors=list)
        assert PATIENCE_S <= now_s() < PATIENCE_S + 2


@virtual
async def test_patience_lasts_as_long_as_there_is_progress(tmp_path: Path) -> None:
    async def one_leaf_per_stream(stream: Stream, index: int) -> None:
        await asyncio.sleep(12)
        await honest_leaf(stream, index)
        raise StreamClosedError("a relay that allows no more")

    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_leaf=one_leaf_per_stream))
        await net.fetch(donors=lambda: [A])
        assert net.store.read(BLOB) == DATA
        assert now_s() > 2 * PATIENCE_S


@virtual
async def test_no_donors_at_all_is_an_error_at_once(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        with pytest.raises(BlobUnavailableError, match="nobody was asked"):
            await net.fetch()
        with pytest.raises(BlobUnavailableError):
            await net.fetch(JOINER)
        assert now_s() == 0.0
