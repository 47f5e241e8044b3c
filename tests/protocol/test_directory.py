"""The directory: what the DHT keeps, whom a peer sees, who counts as alive, and how buckets follow the swarm's size."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.directory import (
    BUCKET_RECORDS,
    DEPARTED_S,
    MAX_EXPIRY_S,
    MAX_LIFE_S,
    Directory,
    bucket_key,
    pack_record,
    validate_entry,
)
from protocol.errors import StreamClosedError
from protocol.identity import Identity
from protocol.ids import PeerId, RunId
from protocol.memory import MemoryNetwork, MemoryTransport, run_virtual
from protocol.records import MAX_RECORD_BYTES, PeerRecord
from protocol.transport import Dht, DhtEntry
from tests.protocol.samples import RUN, SENT_AT_S, damaged, identity, record

RUN_ID = RunId(RUN)
fuzz = settings(max_examples=200, deadline=None, derandomize=True, database=None)


class TableDht(Dht):
    """A table in one place, for directories that share it; its clock is the loop's."""

    def __init__(self) -> None:
        self.table: dict[str, dict[str, DhtEntry]] = defaultdict(dict)
        self.is_down = False
        self.num_reads = 0

    def now_s(self) -> float:
        return SENT_AT_S + asyncio.get_running_loop().time()

    async def store(self, key: str, subkey: str, value: bytes, *, ttl_s: float) -> bool:
        if self.is_down:
            raise StreamClosedError("the network is down")
        now_s = self.now_s()
        if validate_entry(key, subkey, value, now_s + ttl_s, now_s):
            self.table[key][subkey] = DhtEntry(subkey=subkey, value=value, expires_at_s=now_s + ttl_s)
            return True
        return False

    async def get(self, key: str) -> list[DhtEntry]:
        if self.is_down:
            raise StreamClosedError("the network is down")
        self.num_reads += 1
        return [entry for entry in self.table[key].values() if entry.expires_at_s > self.now_s()]


class Peer:
    """A directory and what it publishes."""

    def __init__(self, number: int, dht: TableDht, ttl_s: float = 45.0) -> None:
        self.identity = identity(number)
        self.directory = Directory(dht=dht, identity=self.identity, run=RUN_ID, ttl_s=ttl_s)
        self.id = self.identity.peer_id
        self._dht = dht
        self._sequence = 0

    async def publish(self, **changes: Any) -> bool:
        self._sequence += 1
        fields = {"sequence": self._sequence, "sent_at_s": self._dht.now_s()} | changes
        return await self.directory.publish(record(self.identity, **fields))

    async def refresh(self) -> Mapping[PeerId, PeerRecord]:
        return await self.directory.refresh()


# ---- what the DHT keeps ----------------------------------------------------------------------------------------------------


def entry_for(own: Identity, level: int = 0, **changes: Any) -> tuple[str, str, bytes, float, float]:
    """Arguments of `validate_entry` for an honest record."""
    key = bucket_key(RUN_ID, level, hashlib.sha256(own.peer_id.encode()).digest())
    return key, own.peer_id, pack_record(record(own, **changes), own), SENT_AT_S + 105.0, SENT_AT_S


@pytest.mark.parametrize("level", [0, 1, 5, 17])
def test_an_honest_entry_is_kept(level: int) -> None:
    assert validate_entry(*entry_for(identity(1), level))


@pytest.mark.parametrize("expires_at_s", [math.inf, -math.inf, math.nan, SENT_AT_S + MAX_EXPIRY_S + 1.0, 1e308])
def test_no_entry_lives_for_ever(expires_at_s: float) -> None:
    key, subkey, value, _, now_s = entry_for(identity(1), sent_at_s=1e10)
    assert validate_entry(key, subkey, value, now_s + MAX_EXPIRY_S, now_s)
    assert not validate_entry(key, subkey, value, expires_at_s, now_s)


def test_an_old_record_can_not_be_stored_again_to_outlast_new_ones() -> None:
    key, subkey, value, _, now_s = entry_for(identity(1))
    assert validate_entry(key, subkey, value, now_s + MAX_LIFE_S, now_s)
    assert not validate_entry(key, subkey, value, now_s + MAX_LIFE_S + 1.0, now_s)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "peers/0/0",
        f"{RUN}/peers/0",
        f"{RUN}/peers/0/1",
        f"{RUN}/peers/0/00",
        f"{RUN}/peers/00/0",
        f"{RUN}/peers/0/0/",
        f"{RUN}/peers/0/0\n",
        f"{RUN}/blobs/0/0",
        f"{RUN}/peers/-1/0",
        f"{RUN}/peers/99/0",
        f"{RUN}/peers/٠/0",
        f"{RUN.upper()}/peers/0/0",
        f"{'cd' * 32}/peers/0/0",
        "x" * 100_000,
    ],
)
def test_a_key_that_is_not_the_peer_s_bucket_is_refused(key: str) -> None:
    _, subkey, value, expires_at_s, now_s = entry_for(identity(1))
    assert not validate_entry(key, subkey, value, expires_at_s, now_s)


def test_each_level_has_exactly_one_bucket_for_a_peer() -> None:
    _, subkey, value, expires_at_s, now_s = entry_for(identity(1))
    keys = [f"{RUN}/peers/3/{bucket}" for bucket in range(9)]
    assert sum(validate_entry(key, subkey, value, expires_at_s, now_s) for key in keys) == 1


def test_the_subkey_is_the_signer() -> None:
    key, _, value, expires_at_s, now_s = entry_for(identity(1))
    for subkey in (identity(2).peer_id, "", "\udcff", "x" * 100_000):
        assert not validate_entry(key, subkey, value, expires_at_s, now_s)


def test_oversize_values_are_refused() -> None:
    key, subkey, value, expires_at_s, now_s = entry_for(identity(1))
    assert not validate_entry(key, subkey, value + bytes(MAX_RECORD_BYTES), expires_at_s, now_s)


@fuzz
@given(value=damaged(entry_for(identity(1))[2]) | st.binary(max_size=200))
def test_no_damaged_value_is_kept(value: bytes) -> None:
    key, subkey, honest, expires_at_s, now_s = entry_for(identity(1))
    assert validate_entry(key, subkey, value, expires_at_s, now_s) == (value == honest)


@fuzz
@given(
    key=st.text(max_size=100) | damaged(f"{RUN}/peers/0/0".encode()).map(lambda b: b.decode(errors="surrogateescape"))
)
def test_any_key_is_judged_without_an_error(key: str) -> None:
    honest_key, subkey, value, expires_at_s, now_s = entry_for(identity(1))
    assert validate_entry(key, subkey, value, expires_at_s, now_s) == (key == honest_key)


# ---- whom a peer sees ------------------------------------------------------------------------------------------------------


def test_peers_see_each_other() -> None:
    async def scenario() -> None:
        dht = TableDht()
        a, b, c = Peer(1, dht), Peer(2, dht), Peer(3, dht)
        assert await a.refresh() == {}
        assert a.directory.all_records == {}
        for peer in (a, b, c):
            assert await peer.publish(name=f"peer {peer.id[-4:]}")
        view = await a.refresh()
        assert set(view) == {b.id, c.id}
        assert view == a.directory.peers
        assert view[b.id].name == f"peer {b.id[-4:]}"
        assert set(a.directory.all_records) == {a.id, b.id, c.id}

    run_virtual(scenario())


def test_who_says_goodbye_is_no_partner_but_still_shown() -> None:
    async def scenario() -> None:
        dht = TableDht()
        a, b = Peer(1, dht), Peer(2, dht)
        await a.publish()
        await b.publish()
        assert set(await a.refresh()) == {b.id}
        await b.publish(state="leaving")
        assert await a.refresh() == {}
        assert a.directory.all_records[b.id].state == "leaving"
        await b.publish(state="training")
        assert set(await a.refresh()) == {b.id}

    run_virtual(scenario())


def test_a_silent_peer_is_gone_after_its_ttl_and_stays_gone_while_the_dht_still_holds_it() -> None:
    async def scenario() -> None:
        dht = TableDht()
        a, b = Peer(1, dht), Peer(2, dht)
        await b.publish()
        seen_until_s = 0.0
        for _ in range(60):
            if b.id in await a.refresh():
                seen_until_s = asyncio.get_running_loop().time()
            await asyncio.sleep(3.0)
        assert seen_until_s == 45.0
        await b.publish()
        assert set(await a.refresh()) == {b.id}

    run_virtual(scenario())


def test_the_last_words_of_those_who_are_gone_are_known_for_a_while() -> None:
    async def scenario() -> None:
        dht = TableDht()
        a, b, c = Peer(1, dht), Peer(2, dht), Peer(3, dht)
        await b.publish(round=7)
        await c.publish(state="leaving")
        await a.refresh()
        assert set(a.directory.departed) == {c.id}
        await asyncio.sleep(60.0)
        await a.refresh()
        assert a.directory.departed[b.id].round == 7
        await asyncio.sleep(DEPARTED_S)
        await a.refresh()
        assert a.directory.departed == {}

    run_virtual(scenario())


@pytest.mark.parametrize("skew_s", [-60.0, 60.0])
def test_a_peer_whose_clock_is_a_minute_off_is_seen_all_the_time(skew_s: float) -> None:
    async def scenario() -> None:
        dht = TableDht()
        reader, skewed = Peer(1, dht), identity(2)
        key = f"{RUN}/peers/0/0"
        for sequence in range(1, 40):
            its_now_s = dht.now_s() + skew_s
            value = pack_record(record(skewed, sequence=sequence, sent_at_s=its_now_s), skewed)
            entry = DhtEntry(subkey=skewed.peer_id, value=value, expires_at_s=its_now_s + 105.0)
            assert validate_entry(key, entry.subkey, value, entry.expires_at_s, dht.now_s())
            dht.table[key][entry.subkey] = entry
            assert skewed.peer_id in await reader.refresh()
            await asyncio.sleep(3.0)

    run_virtual(scenario())


def test_the_highest_sequence_wins_whatever_order_it_comes_in() -> None:
    async def scenario() -> None:
        dht = TableDht()
        a, b = Peer(1, dht), Peer(2, dht)
        await b.publish(sequence=7, round=7)
        await a.refresh()
        await b.publish(sequence=5, round=5)
        assert (await a.refresh())[b.id].round == 7
        await b.publish(sequence=8, round=8)
        assert (await a.refresh())[b.id].round == 8

    run_virtual(scenario())


def test_bad_entries_that_a_faulty_dht_returns_are_ignored() -> None:
    async def scenario() -> None:
        dht = TableDht()
        a, b = Peer(1, dht), Peer(2, dht)
        await b.publish()
        key = f"{RUN}/peers/0/0"
        good = dht.table[key][b.id]
        for subkey, value in [
            ("nobody", good.value),
            (identity(3).peer_id, good.value),
            (identity(4).peer_id, b"\xc1"),
            (identity(5).peer_id, good.value[:64] + b"\x91" * 300),
        ]:
            dht.table[key][subkey] = DhtEntry(subkey=subkey, value=value, expires_at_s=good.expires_at_s)
        assert set(await a.refresh()) == {b.id}

    run_virtual(scenario())


def test_a_network_failure_keeps_the_view_and_is_counted() -> None:
    async def scenario() -> None:
        dht = TableDht()
        a, b = Peer(1, dht), Peer(2, dht)
        await b.publish()
        await a.refresh()
        dht.is_down = True
        assert not await a.publish()
        assert set(await a.refresh()) == {b.id}
        assert a.directory.num_failed_reads > 0
        await asyncio.sleep(46.0)
        assert await a.refresh() == {}
        dht.is_down = False
        await b.publish()
        assert set(await a.refresh()) == {b.id}

    run_virtual(scenario())


def test_over_a_transport_that_checks_every_record() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        a, b = identity(1), identity(2)
        async with (
            MemoryTransport(network, a.peer_id, validator=validate_entry) as near,
            MemoryTransport(network, b.peer_id, validator=validate_entry) as far,
        ):
            here = Directory(dht=near.dht, identity=a, run=RUN_ID)
            there = Directory(dht=far.dht, identity=b, run=RUN_ID)
            for sequence in range(1, 30):
                now_s = network.now_s()
                assert await here.publish(record(a, sequence=sequence, sent_at_s=now_s))
                assert await there.publish(record(b, sequence=sequence, sent_at_s=now_s))
                assert (await here.refresh())[b.peer_id].sequence == sequence
                assert (await there.refresh())[a.peer_id].sequence == sequence
                await asyncio.sleep(3.0)
            forged = pack_record(record(a, sequence=99, sent_at_s=network.now_s()), a)
            assert not await far.dht.store(f"{RUN}/peers/0/0", b.peer_id, forged, ttl_s=60.0)

    run_virtual(scenario())


# ---- buckets ---------------------------------------------------------------------------------------------------------------


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
