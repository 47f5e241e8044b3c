"""The directory: whom a peer sees, and who counts as alive."""

from __future__ import annotations

import asyncio

import pytest

from protocol.directory import (
    DEPARTED_S,
    Directory,
    pack_record,
    validate_entry,
)
from protocol.memory import MemoryNetwork, MemoryTransport, run_virtual
from protocol.transport import DhtEntry
from tests.protocol.samples import RUN, identity, record
from tests.protocol.table_dht import RUN_ID, Peer, TableDht


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
