"""Fetching blobs from donors that lie, stall or drip."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from protocol.blob_exchange import BlobUnavailableError
from protocol.blob_server import BlobReply
from protocol.errors import StreamClosedError
from protocol.merkle import LEAF_BYTES, MAX_BLOB_BYTES
from protocol.transport import Stream
from protocol.wire import write_frame, write_message
from tests.protocol.blob_swarm import (
    BLOB,
    DATA,
    LEAVES,
    A,
    B,
    honest_leaf,
    listing,
    lying_leaf,
    now_s,
    scripted,
    stalling_leaf,
    swarm,
    virtual,
)


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
