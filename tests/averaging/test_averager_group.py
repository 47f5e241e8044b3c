"""The group exchange: everybody with everybody, in virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from averaging.averager import ExchangeResult
from averaging.exchange import Exchange
from averaging.exchange_messages import NONCE_BYTES, Answer, Propose
from averaging.group import round_robin
from averaging.search import PROTOCOL
from averaging.swap import describe
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryNetwork
from protocol.transport import Stream
from protocol.virtual_time import run_virtual
from protocol.wire import read_message, write_message
from tests.averaging.actor import TERMS, Actor
from tests.averaging.swarm import Swarm, make_update, open_swarm


async def exchange_all(
    swarm: Swarm, index: int, *, round: int = 5, deadline_s: float = 60.0, at_s: float = 0.0
) -> list[ExchangeResult]:
    await asyncio.sleep(at_s)
    update = make_update(swarm.ids[index], round=round, num_bytes=swarm.num_bytes)
    deadline_s += asyncio.get_running_loop().time()
    return await swarm.averagers[index].exchange_all(update, candidates=swarm.ids, deadline_s=deadline_s)


async def everybody(swarm: Swarm, *, deadline_s: float = 60.0) -> list[list[ExchangeResult]]:
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(exchange_all(swarm, index, deadline_s=deadline_s))
            for index in range(len(swarm.averagers))
        ]
    return [task.result() for task in tasks]


def check_complete(swarm: Swarm, index: int, results: list[ExchangeResult], *, round: int = 5) -> None:
    """Peer `index` has exactly everybody's bytes."""
    assert {result.partner for result in results} == set(swarm.ids) - {swarm.ids[index]}
    for result in results:
        assert result.outcome == "averaged"
        assert result.remote is not None
        assert result.partner is not None
        sent = make_update(result.partner, round=round, num_bytes=swarm.num_bytes)
        assert (result.remote.delta, result.remote.slow) == (sent.delta, sent.slow)
        assert (result.remote.round, result.remote.tokens) == (round, sent.tokens)


def network() -> MemoryNetwork:
    return MemoryNetwork(link=LinkSpec(latency_s=0.01))


def test_round_robin_starts_everybody_with_somebody_else() -> None:
    peers = [PeerId(f"p{i}") for i in range(7)]
    orders = [round_robin(me, [*peers, peers[0]]) for me in peers]
    assert len({order[0] for order in orders}) == len(peers)
    for me, order in zip(peers, orders, strict=True):
        assert sorted([*order, me]) == peers


@pytest.mark.parametrize("num_peers", [1, 2, 3, 5, 8])
def test_all_to_all(num_peers: int) -> None:
    async def main() -> None:
        async with open_swarm(num_peers, network=network()) as swarm:
            for index, results in enumerate(await everybody(swarm)):
                check_complete(swarm, index, results)
            assert not any(averager.violations for averager in swarm.averagers)
            num_pairs = num_peers * (num_peers - 1) // 2
            sent_bytes = sum(transport.traffic.sent_bytes for transport in swarm.transports)
            assert sent_bytes <= num_pairs * (2 * 4000 + 3000), "every pair swaps once"

    run_virtual(main())


def test_round_after_round_with_phases_and_a_late_comer() -> None:
    async def main() -> None:
        async with open_swarm(4, network=network()) as swarm:

            async def life(index: int) -> None:
                for round in range(5):
                    await asyncio.sleep(3.0 + index)
                    check_complete(swarm, index, await exchange_all(swarm, index, round=round), round=round)

            async with asyncio.TaskGroup() as group:
                for index in range(4):
                    group.create_task(life(index))

    run_virtual(main())


def test_a_peer_a_round_ahead_waits_and_a_peer_behind_is_turned_down() -> None:
    async def main() -> None:
        async with open_swarm(2, network=network(), max_lag_rounds=2) as swarm:
            for ahead in (0, 1):
                base = 5 + 10 * ahead
                async with asyncio.TaskGroup() as group:
                    fast = group.create_task(exchange_all(swarm, ahead, round=base + 1, deadline_s=100.0))
                    slow = group.create_task(exchange_all(swarm, 1 - ahead, round=base, at_s=5.0, deadline_s=10.0))
                    again = group.create_task(exchange_all(swarm, 1 - ahead, round=base + 1, at_s=30.0))
                [behind] = slow.result()
                assert behind.outcome in ("alone", "timeout")
                check_complete(swarm, ahead, fast.result(), round=base + 1)
                check_complete(swarm, 1 - ahead, again.result(), round=base + 1)

    run_virtual(main())


def test_a_missing_and_a_dying_peer_cost_only_themselves() -> None:
    async def main() -> None:
        slow = MemoryNetwork(link=LinkSpec(latency_s=0.01, bytes_per_s=20_000.0))
        async with open_swarm(6, network=slow, num_silent=1) as swarm:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(exchange_all(swarm, index, deadline_s=30.0)) for index in range(5)]
                await asyncio.sleep(0.1)
                slow.crash(swarm.ids[4])
            for index in range(4):
                outcomes = {result.partner: result.outcome for result in tasks[index].result()}
                assert [outcomes[swarm.ids[other]] for other in range(4) if other != index] == ["averaged"] * 3
                assert outcomes[swarm.ids[4]] in ("lost", "timeout")
                assert outcomes[swarm.ids[5]] in ("lost", "timeout")

    run_virtual(main())


def test_who_proposes_again_while_it_queues_is_not_forgotten() -> None:
    async def main() -> None:
        slow = MemoryNetwork(link=LinkSpec(latency_s=0.01, bytes_per_s=1000.0))
        async with open_swarm(4, network=slow, num_silent=1) as swarm:
            actor, busy = Actor(swarm), max(swarm.ids)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(exchange_all(swarm, index, deadline_s=30.0)) for index in range(3)]
                await asyncio.sleep(0.5)  # both others are being let in
                first = group.create_task(actor.propose(busy))
                await asyncio.sleep(0.5)
                first.cancel()
                await asyncio.sleep(0.5)
                await actor.propose(busy)
            check_complete(swarm, swarm.ids.index(busy), tasks[swarm.ids.index(busy)].result())

    run_virtual(main())


def test_those_who_stall_do_not_keep_the_others_out() -> None:
    async def main() -> None:
        async with open_swarm(4, network=network(), num_silent=2) as swarm, AsyncExitStack() as stack:
            busy = swarm.ids.index(max(swarm.ids))
            async with asyncio.TaskGroup() as group:
                task = group.create_task(exchange_all(swarm, busy, deadline_s=60.0))
                for index in (2, 3):
                    exchange = Exchange(terms=TERMS, identity=swarm.identities[index], partner=swarm.ids[busy])
                    stream = await stack.enter_async_context(
                        await swarm.transports[index].open(swarm.ids[busy], PROTOCOL)
                    )
                    progress = await describe(make_update(swarm.ids[index]))
                    await write_message(stream, exchange.propose(progress, progress.round))
                    assert exchange.receive_answer(await read_message(stream, Answer))
                await exchange_all(swarm, 1 - busy, deadline_s=50.0)
            outcomes = {result.partner: result.outcome for result in task.result()}
            assert outcomes[swarm.ids[1 - busy]] == "averaged"

    run_virtual(main())


def test_who_is_in_ever_other_rounds_is_not_asked_for_ever() -> None:
    async def main() -> None:
        async with open_swarm(2, network=network(), num_silent=1) as swarm:
            rounds: list[int] = []

            async def turn_down(stream: Stream) -> None:
                await read_message(stream, Propose)
                rounds.append(3 + len(rounds) % 2)
                answer = Answer(accepted=False, reason="other-round", round=rounds[-1], nonce=bytes(NONCE_BYTES))
                await write_message(stream, answer)

            swarm.transports[1].handle(PROTOCOL, turn_down)
            assert swarm.ids[0] < swarm.ids[1]
            [result] = await exchange_all(swarm, 0)
            assert result.outcome == "alone"
            assert len(rounds) < 10

    run_virtual(main())


def test_a_stalled_peer_costs_the_deadline_and_the_others_are_kept() -> None:
    async def main() -> None:
        async with open_swarm(4, network=network()) as swarm:  # peer 3 is alive and never begins
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(exchange_all(swarm, index, deadline_s=20.0)) for index in range(3)]
            for task in tasks:
                assert Counter(result.outcome for result in task.result()) == Counter(averaged=2, timeout=1)
                assert max(result.seconds for result in task.result()) == pytest.approx(20.0, abs=0.1)

    run_virtual(main())


@pytest.mark.parametrize("seed", range(4))
def test_lossy_links_never_raise(seed: int) -> None:
    async def main() -> None:
        lossy = MemoryNetwork(seed=seed, link=LinkSpec(latency_s=0.01, loss=0.03))
        async with open_swarm(6, network=lossy) as swarm:
            for results in await everybody(swarm, deadline_s=10.0):
                assert {result.outcome for result in results} <= {"averaged", "lost", "timeout"}
            assert not any(averager.violations for averager in swarm.averagers)

    run_virtual(main())
