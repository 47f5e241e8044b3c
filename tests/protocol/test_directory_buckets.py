"""How the directory's buckets follow the swarm's size."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from protocol.directory import (
    BUCKET_RECORDS,
    bucket_key,
)
from protocol.ids import PeerId
from protocol.memory import run_virtual
from tests.protocol.table_dht import RUN_ID, Peer, TableDht


async def run_swarm(
    peers: Sequence[Peer], *, num_beats: int, beacon: str = "", num_lookers: int | None = None
) -> dict[PeerId, set[PeerId]]:
    """Let all peers publish and the first (or all) look a few times, mixed if there is a beacon; whom each has seen."""
    lookers = peers[:num_lookers]
    seen: dict[PeerId, set[PeerId]] = {peer.id: set() for peer in lookers}
    for beat in range(num_beats):
        for peer in peers:
            await peer.publish()
        extra = hashlib.sha256(f"{beacon} {beat}".encode()).digest() if beacon else None
        for peer in lookers:
            seen[peer.id] |= set(await peer.directory.refresh(extra=extra))
        await asyncio.sleep(3.0)
    return seen


def test_a_small_swarm_is_one_bucket_and_costs_few_look_ups() -> None:
    async def scenario() -> None:
        dht = TableDht()
        peers = [Peer(number, dht) for number in range(16)]
        seen = await run_swarm(peers, num_beats=2)
        everybody = {peer.id for peer in peers}
        assert all(seen[peer.id] == everybody - {peer.id} for peer in peers)
        assert {peer.directory.level for peer in peers} == {0}
        dht.num_reads = 0
        await peers[0].refresh()
        assert dht.num_reads == 2

    run_virtual(scenario())


def test_in_a_larger_swarm_no_bucket_grows_and_everybody_is_met() -> None:
    async def scenario() -> None:
        dht = TableDht()
        peers = [Peer(number, dht) for number in range(64)]
        await run_swarm(peers, num_beats=2)
        await asyncio.sleep(200.0)  # what was published at level 0 in the beginning is gone
        seen = await run_swarm(peers, num_beats=16, beacon="b", num_lookers=6)
        assert {peer.directory.level for peer in peers} <= {1, 2}
        sizes = [len(await dht.get(key)) for key in list(dht.table)]
        assert max(sizes) <= 2 * BUCKET_RECORDS
        assert min(len(others) for others in seen.values()) == 63

    run_virtual(scenario())


def test_neighbours_see_each_other_whatever_a_look_into_another_bucket_shows() -> None:
    async def scenario() -> None:
        dht = TableDht()
        peers = [Peer(number, dht) for number in range(48)]
        for peer in peers:
            peer.directory.level = 1
        await run_swarm(peers, num_beats=4, beacon="b")
        neighbours = {peer.id: set(peer.directory.neighbours) for peer in peers}
        assert all(one in neighbours[other] for one, others in neighbours.items() for other in others)
        assert all(BUCKET_RECORDS / 2 < len(others) < BUCKET_RECORDS for others in neighbours.values())
        assert all(len(peer.directory.peers) == 47 for peer in peers), "partners to average with are all of them"
        one = peers[0].directory
        assert dict(one.neighbourhood) == dict(one.neighbours) | {peers[0].id: one.all_records[peers[0].id]}

    run_virtual(scenario())


def test_a_newcomer_finds_a_large_swarm_at_its_level() -> None:
    async def scenario() -> None:
        dht = TableDht()
        newcomer = Peer(5000, dht)
        own_digest = hashlib.sha256(newcomer.id.encode()).digest()
        # Only the newcomer's neighbours are made: 20 of a swarm of about 20 · 2^7.
        neighbours = [p for p in (Peer(n, dht) for n in range(4000)) if _shares_bits(p.id, own_digest, 7)][:20]
        for peer in neighbours:
            peer.directory.level = 7
            await peer.publish()
        view = await newcomer.refresh()
        assert set(view) == {peer.id for peer in neighbours}
        assert newcomer.directory.level == 7
        await newcomer.publish()
        assert newcomer.id in dht.table[bucket_key(RUN_ID, 7, own_digest)]

    run_virtual(scenario())


def _shares_bits(peer: PeerId, digest: bytes, num_bits: int) -> bool:
    return bucket_key(RUN_ID, num_bits, hashlib.sha256(peer.encode()).digest()) == bucket_key(RUN_ID, num_bits, digest)


def test_an_island_finds_the_swarm_again() -> None:
    """Two peers at level 0 that see each other need not lose sight of each other to find those who use level 2."""

    async def scenario() -> None:
        dht = TableDht()
        island = [Peer(number, dht) for number in range(2)]
        await run_swarm(island, num_beats=1)
        own_digest = hashlib.sha256(island[0].id.encode()).digest()
        swarm = [p for p in (Peer(n, dht) for n in range(100, 200)) if _shares_bits(p.id, own_digest, 2)]
        assert len(swarm) >= 16
        num_looks = 0
        while island[0].directory.level != 2:
            for peer in swarm:
                peer.directory.level = 2
                await peer.publish()
            for peer in island:
                await peer.publish()
            await island[0].refresh()
            num_looks += 1
            assert num_looks <= 20
            await asyncio.sleep(3.0)
        assert set(await island[0].refresh()) >= {peer.id for peer in swarm}

    run_virtual(scenario())


def test_a_shrunken_swarm_comes_down_again() -> None:
    async def scenario() -> None:
        dht = TableDht()
        few = [Peer(number, dht) for number in range(4)]
        for peer in few:
            peer.directory.level = 6
        seen = await run_swarm(few, num_beats=4)
        assert {peer.directory.level for peer in few} == {0}
        assert all(len(others) == 3 for others in seen.values())

    run_virtual(scenario())
