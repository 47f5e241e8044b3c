"""Fetching blobs: several donors, liars, stalls, crashes, resuming; in virtual time over the in-process network."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from protocol.blob_exchange import MAX_DONORS, PATIENCE_S, BlobUnavailableError, fetch_blob
from protocol.blob_server import BlobReply, serve_blobs
from protocol.blobs import BlobStore
from protocol.errors import StreamClosedError, UserError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryTransport
from protocol.merkle import LEAF_BYTES, MAX_BLOB_BYTES, LeafList
from protocol.transport import Stream
from protocol.wire import write_frame, write_message
from tests.protocol.blob_swarm import (
    BLOB,
    DATA,
    JOINER,
    LEAVES,
    NUM_LEAVES,
    A,
    B,
    C,
    honest_leaf,
    listing,
    lying_leaf,
    now_s,
    scripted,
    stalling_leaf,
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
async def test_a_liar_is_dropped_at_its_first_leaf_and_named(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_leaf=lying_leaf))
        await net.donor(B)
        report = await net.fetch(A, B)
        assert net.store.read(BLOB) == DATA
        assert report.received_bytes == {B: len(DATA)}
        assert [(error.peer, error.reason) for error in report.violations] == [(A, "leaf 0 does not match its hash")]


@virtual
async def test_only_a_liar_means_unavailable_and_nothing_kept(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_leaf=lying_leaf))
        with pytest.raises(
            BlobUnavailableError, match=r"cannot be had from any peer \(donor-a: leaf 0 does not"
        ) as caught:
            await net.fetch(A)
        assert [error.peer for error in caught.value.report.violations] == [A]
        assert not net.store.has(BLOB)


BAD_LISTS = {
    "size beyond what is allowed": (len(DATA) + 1, LEAVES.hashes),
    "largest size there is": (MAX_BLOB_BYTES, LEAVES.hashes),
    "another blob's hashes": (len(DATA), bytes(len(LEAVES.hashes))),
    "right hashes, wrong size": (len(DATA) - 1, LEAVES.hashes),
    "no size": (None, b""),
}


@pytest.mark.parametrize("claim", BAD_LISTS.values(), ids=BAD_LISTS.keys())
@virtual
async def test_a_bad_leaf_list_costs_nothing_and_is_a_violation(
    tmp_path: Path, claim: tuple[int | None, bytes]
) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_list=listing(*claim), on_leaf=honest_leaf))
        with pytest.raises(BlobUnavailableError) as caught:
            await net.fetch(A)
        assert [error.peer for error in caught.value.report.violations] == [A]
        assert not list(net.store.root.iterdir()), "no file was made for it"
        assert net.joiner.traffic.received_bytes < 1000
        await net.donor(B)
        await net.fetch(A, B)
        assert net.store.read(BLOB) == DATA


@virtual
async def test_a_size_beyond_the_format_is_a_violation(tmp_path: Path) -> None:
    async def on_list(stream: Stream) -> None:
        await write_frame(stream, b"\x82\xa6status\xa2ok\xaasize_bytes\xcf" + b"\xff" * 8)

    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_list=on_list, on_leaf=honest_leaf))
        with pytest.raises(BlobUnavailableError) as caught:
            await net.fetch(A)
        assert len(caught.value.report.violations) == 1


@virtual
async def test_a_truncated_leaf_is_fetched_again(tmp_path: Path) -> None:
    num_broken = 0

    async def truncating(stream: Stream, index: int) -> None:
        nonlocal num_broken
        if index == 3 and num_broken < 3:
            num_broken += 1
            await write_message(stream, BlobReply(status="ok"))
            await stream.write(DATA[3 * LEAF_BYTES : 3 * LEAF_BYTES + 5000])
            raise StreamClosedError("gone in the middle of a leaf")
        await honest_leaf(stream, index)

    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_leaf=truncating))
        report = await net.fetch(A)
        assert net.store.read(BLOB) == DATA
        assert num_broken == 3
        assert report.violations == [], "a broken connection is nobody's fault"


@virtual
async def test_a_stalled_donor_holds_up_nothing(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_leaf=stalling_leaf))
        await net.donor(B)
        report = await net.fetch(A, B)
        assert report.received_bytes == {B: len(DATA)}
        assert now_s() < 2.0, "the stalled donor's leaves went to the other without waiting for a deadline"


@virtual
async def test_a_donor_that_stalls_before_the_list_holds_up_nothing(tmp_path: Path) -> None:
    async def on_list(stream: Stream) -> None:
        await asyncio.Event().wait()

    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_list=on_list, on_leaf=honest_leaf))
        await net.donor(B)
        await net.fetch(A, B)
        assert now_s() < 2.0


@virtual
async def test_a_lone_stalled_donor_is_given_up_at_its_deadlines(tmp_path: Path) -> None:
    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_leaf=stalling_leaf))
        with pytest.raises(BlobUnavailableError, match="does not answer"):
            await net.fetch(A)
        assert now_s() < 150


@virtual
async def test_a_dripping_donor_is_too_slow(tmp_path: Path) -> None:
    async def dripping(stream: Stream, index: int) -> None:
        await write_message(stream, BlobReply(status="ok"))
        for byte in DATA[:100_000]:
            await stream.write(bytes([byte]))
            await asyncio.sleep(5)

    async with swarm(tmp_path) as net:
        await net.donor(A, handler=scripted(on_leaf=dripping))
        with pytest.raises(BlobUnavailableError, match="too slowly"):
            await net.fetch(A)


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
