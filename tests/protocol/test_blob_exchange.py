"""Fetching blobs: several donors, one disk; in virtual time over the in-process network."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from protocol.blob_exchange import MAX_DONORS, BlobUnavailableError, fetch_blob
from protocol.blob_server import serve_blobs
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryTransport
from protocol.merkle import LEAF_BYTES, LeafList
from tests.protocol.blob_swarm import (
    BLOB,
    DATA,
    JOINER,
    A,
    B,
    C,
    lying_leaf,
    now_s,
    scripted,
    swarm,
    virtual,
)
from tests.protocol.test_blobs import largest_file


@virtual
async def test_one_donor(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        progress: list[tuple[int, int]] = []
        report = await net.fetch(A, on_progress=lambda done, size: progress.append((done, size)))
        assert net.store.read(BLOB) == DATA
        assert progress[0] == (0, len(DATA))
        assert progress[-1] == (len(DATA), len(DATA))
        assert progress == sorted(progress)
        assert report.received_bytes == {A: len(DATA)}
        assert report.violations == []
        assert not list(net.store.root.glob("*.partial"))
        assert now_s() < 1.0, "requests are sent ahead: 5 MB at 10 MB/s and a few round trips"
        assert (await net.fetch(A)).received_bytes == {}, "it is here already"


@virtual
async def test_an_empty_blob(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A, data=b"")
        blob = LeafList.of_leaves([]).blob
        await fetch_blob(blob, transport=net.joiner, store=net.store, donors=[A], max_bytes=0)
        assert net.store.read(blob) == b""


@virtual
async def test_what_was_fetched_is_served_on(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        await net.fetch(A)
        net.network.crash(A)
        serve_blobs(net.joiner, net.store)
        late = await net.stack.enter_async_context(MemoryTransport(net.network, C))
        store = BlobStore(tmp_path / "late")
        await fetch_blob(BLOB, transport=late, store=store, donors=[JOINER], max_bytes=len(DATA))
        assert store.read(BLOB) == DATA


@virtual
async def test_two_donors_share_the_load_by_their_speed(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        data = random.Random(1).randbytes(24 * LEAF_BYTES)
        await net.donor(A, data=data)
        await net.donor(B, data=data)
        net.network.set_link(A, JOINER, LinkSpec(latency_s=0.01, bytes_per_s=3e7))
        blob = BlobStore(tmp_path / A).blobs()[0]
        report = await fetch_blob(blob, transport=net.joiner, store=net.store, donors=[A, B], max_bytes=len(data))
        assert net.store.read(blob) == data
        assert report.received_bytes.total() == len(data)
        assert 2 * report.received_bytes[B] < report.received_bytes[A] < 6 * report.received_bytes[B]
        assert now_s() < 1.2 * len(data) / 4e7 + 0.3


@virtual
async def test_a_donor_without_the_blob_is_asked_once(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A, data=None)
        with pytest.raises(BlobUnavailableError, match="lacks the blob") as caught:
            await net.fetch(A)
        assert now_s() < 1.0
        assert caught.value.report.violations == []


@virtual
async def test_a_donor_with_a_damaged_copy_is_no_liar(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        with (tmp_path / A / BLOB).open("r+b") as file:
            file.seek(4 * LEAF_BYTES)
            file.write(bytes(100))
        with pytest.raises(BlobUnavailableError, match="lacks the blob") as caught:
            await net.fetch(A)
        assert caught.value.report.violations == []
        await net.donor(B)
        report = await net.fetch(A, B)
        assert net.store.read(BLOB) == DATA
        assert report.received_bytes[B] < len(DATA)


@virtual
async def test_a_full_disk_is_a_user_error_not_a_group(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        await net.donor(B)
        with (
            largest_file(2 * LEAF_BYTES),
            pytest.raises(UserError, match=r"^cannot keep a blob in .*; free space") as caught,
        ):
            await net.fetch(A, B)
        assert "\n" not in str(caught.value)
        assert not net.store.has(BLOB)
        await net.fetch(A, B)
        assert net.store.read(BLOB) == DATA


@virtual
async def test_a_disk_that_fills_up_midway_keeps_what_fits(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)

        def fill(done_bytes: int, size_bytes: int) -> None:
            if done_bytes == LEAF_BYTES:
                limit.enter_context(largest_file(2 * LEAF_BYTES))

        async with AsyncExitStack() as limit:
            with pytest.raises(UserError, match=r"^cannot keep a blob"):
                await net.fetch(A, on_progress=fill)
        report = await net.fetch(A)
        assert report.received_bytes[A] == len(DATA) - 2 * LEAF_BYTES
        assert net.store.read(BLOB) == DATA


@virtual
async def test_two_fetches_of_one_blob_are_one(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        reports = await asyncio.gather(net.fetch(A), net.fetch(A))
        assert sorted(report.received_bytes.total() for report in reports) == [0, len(DATA)]


@virtual
async def test_more_donors_than_slots_are_all_reached_in_the_end(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        bad = [PeerId(f"bad-{index}") for index in range(2 * MAX_DONORS)]
        for name in bad:
            await net.donor(name, handler=scripted(on_leaf=lying_leaf))
        await net.donor(B)
        report = await net.fetch(*bad, B)
        assert net.store.read(BLOB) == DATA
        assert sorted(str(error.peer) for error in report.violations) == sorted(bad)


@virtual
async def test_a_lossy_link_is_only_slow(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A)
        net.network.set_link(A, JOINER, LinkSpec(latency_s=0.01, bytes_per_s=1e7, loss=0.1))
        await net.fetch(donors=lambda: [A])
        assert net.store.read(BLOB) == DATA


@pytest.mark.net
async def test_two_real_peers_serve_a_third_and_one_of_them_goes_away(tmp_path: Path) -> None:
    from protocol.libp2p import Libp2pTransport

    def peer(name: str, invitations: list[str]) -> Libp2pTransport:
        return Libp2pTransport(
            identity=Identity.load_or_create(tmp_path / name / "key"),
            listen=["/ip4/127.0.0.1/tcp/0"],
            initial_peers=invitations,
            runtime_dir=tmp_path / name / "run",
            validator=None,
        )

    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(peer("a", []))
        invitations = await first.addresses()
        leaver = await stack.enter_async_context(AsyncExitStack())
        donor = await leaver.enter_async_context(peer("b", invitations))
        joiner = await stack.enter_async_context(peer("joiner", invitations))
        stores = [BlobStore(tmp_path / name / "blobs") for name in ("a", "b", "joiner")]
        for transport, store in zip((first, donor), stores, strict=False):
            store.put(DATA)
            serve_blobs(transport, store)
        leaving: list[asyncio.Future[None]] = []

        def on_progress(done_bytes: int, size_bytes: int) -> None:
            if done_bytes >= LEAF_BYTES and not leaving:
                leaving.append(asyncio.ensure_future(leaver.aclose()))

        await fetch_blob(
            BLOB,
            transport=joiner,
            store=stores[2],
            donors=[donor.peer_id, first.peer_id],
            max_bytes=len(DATA),
            on_progress=on_progress,
        )
        await leaving[0]
        assert stores[2].read(BLOB) == DATA
