"""Which foreign bucket a peer reads: both sides of it know each other, and over the rounds every bucket meets every other."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from node.mixing import foreign_bucket
from node.preparation import Preparation
from protocol.ids import PeerId, RunId
from protocol.virtual_time import run_virtual

RUN = RunId("5a" * 32)
PEERS = [PeerId(f"peer {number}") for number in range(200)]


def first_bits(digest: bytes, level: int) -> int:
    return int.from_bytes(digest[:8]) >> (64 - level)


def own_bucket(peer: PeerId, level: int) -> int:
    return first_bits(hashlib.sha256(peer.encode()).digest(), level)


def test_buckets_read_each_other_at_every_level() -> None:
    for round in range(5):
        for level in (1, 3, 4):
            reads = {own_bucket(p, level): first_bits(foreign_bucket(RUN, round, p), level) for p in PEERS}
            assert len(reads) == 2**level
            assert all(reads[foreign] == own for own, foreign in reads.items())


def test_over_the_rounds_a_bucket_meets_all_others() -> None:
    met = {first_bits(foreign_bucket(RUN, round, PEERS[0]), 4) for round in range(150)}
    assert met == set(range(16))


def test_runs_and_rounds_draw_different_lots() -> None:
    lots = {foreign_bucket(run, round, PEERS[0]) for run in (RUN, RunId("6b" * 32)) for round in range(3)}
    assert len(lots) == 6


def test_a_training_peer_reads_the_bucket_that_reads_its_own() -> None:
    read: list[bytes | None] = []

    class Idle:
        """No data, and a directory that remembers what it was asked for."""

        async def batches(self, round: int) -> None: ...

        async def refresh(self, *, extra: bytes | None = None) -> None:
            read.append(extra)

    async def story() -> None:
        idle: Any = Idle()
        for peer in PEERS[:2]:
            async with asyncio.TaskGroup() as tasks:
                preparation = Preparation(tasks, source=idle, directory=idle, run=RUN, peer=peer)
                preparation.end(5, steps_left=1)
                await preparation.looked(timeout_s=1.0)

    run_virtual(story())
    assert read == [foreign_bucket(RUN, 5, peer) for peer in PEERS[:2]]
