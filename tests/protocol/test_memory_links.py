"""Links that are drawn at random: the distribution, the independence of order, doomed streams, and the counters."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable

import pytest

from protocol.errors import StreamClosedError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport, run_virtual
from protocol.memory_links import Chance, RandomLink
from protocol.transport import Stream

A, B, C = (Identity.generate(bytes([number]) * 32).peer_id for number in range(3))
ECHO = "/llm-node/echo/1"


async def echo(stream: Stream) -> None:
    while True:
        await stream.write(await stream.read_exactly(1))


def with_pair(network: MemoryNetwork, scenario: Callable[[MemoryTransport, MemoryTransport], Awaitable[None]]) -> None:
    async def main() -> None:
        async with MemoryTransport(network, A) as a, MemoryTransport(network, B) as b:
            b.handle(ECHO, echo)
            await scenario(a, b)

    run_virtual(main())


def now_s() -> float:
    return asyncio.get_running_loop().time()


class TestChance:
    def test_a_number_belongs_to_its_name_and_seed(self) -> None:
        chance = Chance(1)
        numbers = [chance.uniform("a", 1), chance.uniform("a", 2), chance.uniform("b", 1)]
        assert len(set(numbers)) == 3
        assert [chance.uniform("a", 1), Chance(1).uniform("a", 1)] == [numbers[0]] * 2
        assert Chance(2).uniform("a", 1) != numbers[0]
        assert all(0.0 < number < 1.0 for number in numbers)

    @pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
    def test_log_normal_has_the_mean_and_deviation_asked_for(self, ratio: float) -> None:
        chance = Chance(0)
        draws = [chance.log_normal(0.2, ratio, index) for index in range(20_000)]
        mean = sum(draws) / len(draws)
        assert mean == pytest.approx(0.2, rel=0.06)
        logs = [math.log(draw) for draw in draws]  # the logarithm's deviation is known exactly, and estimated well
        centre = sum(logs) / len(logs)
        deviation = math.sqrt(sum((log - centre) ** 2 for log in logs) / len(logs))
        assert deviation == pytest.approx(math.sqrt(math.log1p(ratio * ratio)), rel=0.02)

    def test_no_deviation_is_the_mean(self) -> None:
        assert Chance(0).log_normal(0.2, 0.0, "x") == 0.2


def test_every_message_has_a_latency_of_its_own_and_order_is_kept() -> None:
    arrivals: list[float] = []

    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        async def note(stream: Stream) -> None:
            for expected in range(50):
                assert await stream.read_exactly(1) == bytes([expected])
                arrivals.append(now_s())

        b.handle("/llm-node/note/1", note)
        async with await a.open(B, "/llm-node/note/1") as stream:
            for number in range(50):
                await stream.write(bytes([number]))
            await asyncio.sleep(10)

    network = MemoryNetwork(seed=3, link=RandomLink(latency_s=0.05, latency_ratio=1.0))
    with_pair(network, scenario)
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) > 2, "all at once would be one latency for all"


def test_a_link_s_luck_does_not_depend_on_other_links() -> None:
    def echo_time_s(*, others: bool) -> float:
        network = MemoryNetwork(seed=5, link=RandomLink(latency_s=0.05, latency_ratio=1.0))
        took: list[float] = []

        async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
            async with MemoryTransport(network, C) as c, asyncio.TaskGroup() as tasks:
                if others:
                    tasks.create_task(ask(c))
                took.append(await ask(a))

        with_pair(network, scenario)
        return took[0]

    async def ask(transport: MemoryTransport) -> float:
        async with await transport.open(B, ECHO) as stream:
            await stream.write(b"x")
            await stream.read_exactly(1)
        return now_s()

    assert echo_time_s(others=True) == echo_time_s(others=False)


def test_a_table_gives_each_direction_its_link() -> None:
    slow, fast = LinkSpec(latency_s=3.0), LinkSpec(latency_s=1.0)
    network = MemoryNetwork(links=lambda source, target: slow if (source, target) == (A, B) else fast)

    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        async with await a.open(B, ECHO) as stream:
            assert now_s() == pytest.approx(4.0)
            await stream.write(b"x")
            await stream.read_exactly(1)
            assert now_s() == pytest.approx(8.0)

    with_pair(network, scenario)


def test_a_doomed_stream_breaks_when_both_ends_have_written_enough() -> None:
    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        async with await a.open(B, ECHO) as stream:
            for _ in range(2):
                await stream.write(b"x")
                await stream.read_exactly(1)
            await stream.write(b"x")  # our third; the other end's third is one too many
            with pytest.raises(StreamClosedError):
                await stream.read_exactly(1)

    with_pair(MemoryNetwork(link=RandomLink(latency_s=0.1, stream_loss=1.0, spared_writes=2)), scenario)


def test_the_share_of_doomed_streams_is_the_one_asked_for() -> None:
    outcomes: list[bool] = []

    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        for _ in range(400):
            async with await a.open(B, ECHO) as stream:
                try:
                    await stream.write(b"x")
                    await stream.read_exactly(1)
                    outcomes.append(True)
                except StreamClosedError:
                    outcomes.append(False)

    with_pair(MemoryNetwork(seed=1, link=RandomLink(latency_s=0.1, stream_loss=0.3)), scenario)
    assert outcomes.count(False) / 400 == pytest.approx(0.3, abs=0.07)


def test_messages_streams_and_look_ups_are_counted() -> None:
    async def scenario(a: MemoryTransport, b: MemoryTransport) -> None:
        async with await a.open(B, ECHO) as stream:
            for _ in range(3):
                await stream.write(b"x")
                await stream.read_exactly(1)
        await a.dht.store("k", "s", b"v", ttl_s=60)
        await a.dht.get("k")
        await a.dht.get("l")
        assert (a.counts.streams, a.counts.messages) == (1, 3)
        assert (a.counts.dht_stores, a.counts.dht_gets, a.counts.dht_hops) == (1, 2, 3)
        assert (b.counts.streams, b.counts.messages) == (0, 3)

    with_pair(MemoryNetwork(), scenario)


def test_forgotten_wires_change_nothing() -> None:
    """So many pairs talk that wires are forgotten; a stream that is still open keeps its own, for `set_link` to find."""

    async def main() -> None:
        network = MemoryNetwork(link=LinkSpec(latency_s=0.01))
        async with MemoryTransport(network, A) as a, MemoryTransport(network, B) as b:
            b.handle(ECHO, echo)
            async with await a.open(B, ECHO) as stream:
                others = [MemoryTransport(network, PeerId(f"p{number}")) for number in range(70)]
                for transport in others:
                    await transport.__aenter__()
                    transport.handle(ECHO, echo)
                for one, other in itertools.permutations(others, 2):
                    async with await one.open(other.peer_id, ECHO):
                        pass
                network.set_link(A, B, LinkSpec(latency_s=5.0))
                began_s = now_s()
                await stream.write(b"x")
                await stream.read_exactly(1)
                assert now_s() - began_s == pytest.approx(10.0)
                assert len(network._wires) < 70 * 69
                for transport in others:
                    await transport.__aexit__(None, None, None)

    run_virtual(main())
