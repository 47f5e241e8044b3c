"""The in-process record table: who is nearest, how long a look-up takes, and whose check counts."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport, run_virtual
from protocol.memory_dht import Keyspace, position_of


def transports(num_peers: int) -> list[MemoryTransport]:
    network = MemoryNetwork()
    return [MemoryTransport(network, PeerId(f"p{number}")) for number in range(num_peers)]


@given(num_peers=st.integers(0, 40), key=st.text(max_size=5), gone=st.sets(st.integers(0, 39)))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_nearest_is_the_order_of_xor_distance(num_peers: int, key: str, gone: set[int]) -> None:
    space, peers = Keyspace(), transports(num_peers)
    for peer in peers:
        space.add(peer)
    left = [peer for number, peer in enumerate(peers) if number not in gone]
    for peer in set(peers) - set(left):
        space.remove(peer)
    target = position_of(key)
    assert len(space) == len(left)
    assert list(space.nearest(target)) == sorted(left, key=lambda peer: peer.position ^ target)


@pytest.mark.parametrize(("num_peers", "num_hops"), [(1, 1), (20, 1), (21, 2), (401, 3)])
def test_a_look_up_takes_kademlia_s_hops(num_peers: int, num_hops: int) -> None:
    async def main() -> None:
        network = MemoryNetwork(link=LinkSpec(latency_s=0.5))
        peers = [MemoryTransport(network, PeerId(f"p{number}")) for number in range(num_peers)]
        for peer in peers:
            network.add(peer)
        await peers[0].dht.get("k")
        assert asyncio.get_running_loop().time() == pytest.approx(num_hops * 1.0)
        assert peers[0].counts.dht_hops == num_hops

    run_virtual(main())


def test_holders_follow_who_comes_and_goes() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        peers = [MemoryTransport(network, PeerId(f"p{number}")) for number in range(30)]
        for peer in peers[:20]:
            network.add(peer)
        first = network.nearest("k", peers[0].peer_id)
        network.remove(next(peer for peer in peers if peer is first[0]))
        assert network.nearest("k", peers[0].peer_id)[: len(first) - 1] == first[1:]
        for peer in peers[20:]:
            network.add(peer)
        alive = [peer for peer in peers if peer is not first[0]]
        target = position_of("k")
        expected = sorted(alive, key=lambda peer: peer.position ^ target)[: len(first)]
        assert network.nearest("k", peers[0].peer_id) == expected

    run_virtual(main())


def test_a_reader_trusts_only_a_holder_that_checks_as_it_does() -> None:
    asked: list[str] = []

    def strict(key: str, subkey: str, value: bytes, expires_at_s: float, now_s: float) -> bool:
        asked.append(subkey)
        return value != b"bad"

    async def main() -> None:
        network = MemoryNetwork()
        async with (
            MemoryTransport(network, PeerId("lax")) as lax,
            MemoryTransport(network, PeerId("strict"), validator=strict) as reader,
        ):
            await lax.dht.store("k", "good", b"good", ttl_s=60)
            await lax.dht.store("k", "bad", b"bad", ttl_s=60)
            asked.clear()
            assert {entry.subkey for entry in await reader.dht.get("k")} == {"good"}
            assert "bad" in asked, "what only the lax holder keeps is checked by the reader"
            await asyncio.sleep(61)
            assert await reader.dht.get("k") == []

    run_virtual(main())
