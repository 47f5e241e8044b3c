"""Measuring links, on the memory network in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from node.pipeline.links import ENOUGH, FRESH_S, LEAST_BYTES, MOST_BYTES, PROBE_PROTOCOL, Links, Probe, tail_of
from protocol.errors import LlmNodeError
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from protocol.records import MAX_LINKS
from protocol.virtual_time import run_virtual
from protocol.wire import write_frame, write_message
from tests.node.pipeline.records import peer_id

SLOW, FAST = LinkSpec(latency_s=0.05, bytes_per_s=1e6), LinkSpec(latency_s=0.002, bytes_per_s=2e7)
PAYLOAD_BYTES = 100_000


def test_a_probe_finds_latency_and_goodput_of_each_link() -> None:
    async def story() -> None:
        network = MemoryNetwork()
        network.set_link(peer_id(0), peer_id(1), SLOW)
        network.set_link(peer_id(0), peer_id(2), FAST)
        async with (
            MemoryTransport(network, peer_id(0)) as own,
            MemoryTransport(network, peer_id(1)) as slow,
            MemoryTransport(network, peer_id(2)) as fast,
        ):
            links = Links(own, payload_bytes=PAYLOAD_BYTES)
            for transport in (slow, fast):
                Links(transport, payload_bytes=PAYLOAD_BYTES)
            for _ in range(4):  # two each
                await links.probe_next([own.peer_id, slow.peer_id, fast.peer_id])
                await asyncio.sleep(1.0)
            found = {note.peer: note for note in links.notes()}
        assert set(found) == {tail_of(peer_id(1)), tail_of(peer_id(2))}
        for number, spec in ((1, SLOW), (2, FAST)):
            note = found[tail_of(peer_id(number))]
            assert note.latency_s == pytest.approx(spec.latency_s, rel=0.05)
            assert note.bytes_per_s == pytest.approx(spec.bytes_per_s, rel=0.1)

    run_virtual(story())


def test_what_comes_in_counts_and_who_is_gone_is_forgotten() -> None:
    async def story() -> None:
        network = MemoryNetwork(link=SLOW)
        async with MemoryTransport(network, peer_id(0)) as own, MemoryTransport(network, peer_id(1)) as other:
            links = Links(own, payload_bytes=PAYLOAD_BYTES)
            Links(other, payload_bytes=PAYLOAD_BYTES)
            links.note_transfer(other.peer_id, 1000, 1.0)  # nothing is known of the round trip yet
            assert links.notes() == []
            await links.probe_next([other.peer_id])
            for _ in range(16):
                links.note_transfer(other.peer_id, 1_000_000, 2.0)
            assert links.notes()[0].bytes_per_s == pytest.approx(5e5, rel=1e-3)
            await links.probe_next([])
            assert links.notes() == []

    run_virtual(story())


def test_probes_carry_as_much_as_a_payload_until_the_link_is_known() -> None:
    async def story() -> None:
        network = MemoryNetwork(link=SLOW)
        async with MemoryTransport(network, peer_id(0)) as own, MemoryTransport(network, peer_id(1)) as other:
            links = Links(own, payload_bytes=PAYLOAD_BYTES)
            Links(other, payload_bytes=PAYLOAD_BYTES)
            sent = []
            for pause_s in (1.0,) * 6 + (FRESH_S, 1.0):
                before = other.traffic.sent_bytes
                await links.probe_next([other.peer_id])
                sent.append(other.traffic.sent_bytes - before)
                await asyncio.sleep(pause_s)
        carried = [num_bytes >= PAYLOAD_BYTES for num_bytes in sent]
        assert carried == [False] + [True] * (ENOUGH - 1) + [False] * 3 + [True]
        assert LEAST_BYTES <= sent[0] < LEAST_BYTES + 1000  # it may be a slow one
        assert max(sent) < PAYLOAD_BYTES + 1000

    run_virtual(story())


def test_a_peer_that_answers_nothing_costs_a_turn_and_no_more() -> None:
    async def story() -> None:
        network = MemoryNetwork(link=FAST)
        async with MemoryTransport(network, peer_id(0)) as own, MemoryTransport(network, peer_id(1)) as other:
            links = Links(own, payload_bytes=PAYLOAD_BYTES)
            Links(other, payload_bytes=PAYLOAD_BYTES)
            for _ in range(2):
                await links.probe_next([peer_id(9), other.peer_id])  # nobody has the first one's address
            assert [note.peer for note in links.notes()] == [tail_of(other.peer_id)]

    run_virtual(story())


@pytest.mark.parametrize("num_bytes", [MOST_BYTES + 1, -1])
def test_nobody_gets_more_than_a_probe_may_ask_for(num_bytes: int) -> None:
    async def story() -> None:
        network = MemoryNetwork(link=FAST)
        async with MemoryTransport(network, peer_id(0)) as own, MemoryTransport(network, peer_id(1)) as other:
            Links(own, payload_bytes=PAYLOAD_BYTES)
            async with await other.open(own.peer_id, PROBE_PROTOCOL) as stream:
                await write_message(stream, Probe.model_construct(num_bytes=num_bytes))
                with pytest.raises(LlmNodeError):
                    await stream.read_exactly(1)
            assert own.incoming.violations[other.peer_id] == 1
            async with await other.open(own.peer_id, PROBE_PROTOCOL) as stream:
                await write_frame(stream, b"\xc1")
                with pytest.raises(LlmNodeError):
                    await stream.read_exactly(1)

    run_virtual(story())


def test_a_record_holds_so_many_links_at_most() -> None:
    async def story() -> None:
        network = MemoryNetwork(link=FAST)
        async with MemoryTransport(network, peer_id(0)) as own:
            links = Links(own, payload_bytes=PAYLOAD_BYTES)
            others = [MemoryTransport(network, peer_id(number)) for number in range(1, MAX_LINKS + 4)]
            for transport in others:
                await transport.__aenter__()
                Links(transport, payload_bytes=PAYLOAD_BYTES)
            for _ in others:
                await links.probe_next([transport.peer_id for transport in others])
            assert len(links.notes()) == MAX_LINKS
            for transport in others:
                await transport.__aexit__(None, None, None)

    run_virtual(story())
