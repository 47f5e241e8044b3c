"""Whole exchanges of honest peers over the in-process network, in virtual time: pairs, odd ones, rounds, faults of the network."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import pytest

from averaging.averager import ExchangeResult
from averaging.priority import priority, ranking
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryNetwork
from protocol.virtual_time import run_virtual
from tests.averaging.swarm import RUN, Swarm, identities, make_update, open_swarm


def together(num_peers: int, *, link: LinkSpec | None = None, seed: int = 0, round: int = 5) -> list[ExchangeResult]:
    async def main() -> list[ExchangeResult]:
        network = MemoryNetwork(seed=seed, link=link or LinkSpec(latency_s=0.02))
        async with open_swarm(num_peers, network=network) as swarm:
            results = await swarm.exchange_each(round=round)
            swarm.check(dict(enumerate(results)), rounds=dict.fromkeys(range(num_peers), round))
            assert not any(averager.violations for averager in swarm.averagers)
            return results

    return run_virtual(main())


class TestLockstep:
    @pytest.mark.parametrize("num_peers", [1, 2, 3, 5, 8, 33])
    @pytest.mark.parametrize("latency_s", [0.0, 0.02])
    def test_everybody_is_paired_but_an_odd_one(self, num_peers: int, latency_s: float) -> None:
        results = together(num_peers, link=LinkSpec(latency_s=latency_s))
        outcomes = Counter(result.outcome for result in results)
        assert outcomes == Counter(averaged=num_peers // 2 * 2, alone=num_peers % 2)
        assert max(result.seconds for result in results) < 3.0

    def test_partners_change_from_round_to_round(self) -> None:
        met = {result.partner for round in range(12) for result in [together(8, round=round)[0]]}
        assert len(met) >= 5

    @pytest.mark.parametrize("num_peers", [5, 8])
    def test_the_pairs_are_the_greedy_matching_of_the_documented_priorities(self, num_peers: int) -> None:
        results = together(num_peers)
        ids = [identity.peer_id for identity in identities(num_peers)]
        left = set(ids)
        expected: dict[PeerId, PeerId] = {}
        ties = sorted(itertools.combinations(ids, 2), key=lambda tie: priority(RUN.encode(), 5, *tie), reverse=True)
        for a, b in ties:
            if a in left and b in left:
                expected |= {a: b, b: a}
                left -= {a, b}
        assert [result.partner for result in results] == [expected.get(peer) for peer in ids]

    def test_many_rounds_one_after_the_other(self) -> None:
        async def main() -> None:
            async with open_swarm(4, network=MemoryNetwork(link=LinkSpec(latency_s=0.01))) as swarm:

                async def life(index: int) -> list[str]:
                    outcomes: list[str] = []
                    for round in range(10):
                        await asyncio.sleep(5.0 + 0.7 * index)
                        outcomes.append((await swarm.exchange(index, round=round, deadline_s=20.0)).outcome)
                    return outcomes

                async with asyncio.TaskGroup() as group:
                    lives = [group.create_task(life(index)) for index in range(4)]
                outcomes = Counter(outcome for task in lives for outcome in task.result())
                assert outcomes["averaged"] >= 34
                assert outcomes["lost"] == 0

        run_virtual(main())


class TestRounds:
    def test_the_faster_waits_for_the_slower(self) -> None:
        async def main() -> None:
            async with open_swarm(2) as swarm:
                async with asyncio.TaskGroup() as group:
                    fast = group.create_task(swarm.exchange(0))
                    slow = group.create_task(swarm.exchange(1, at_s=30.0))
                results = {0: fast.result(), 1: slow.result()}
                assert swarm.check(results) == {frozenset({0, 1})}
                assert results[0].seconds == pytest.approx(30.0, abs=0.1)
                assert results[1].seconds == pytest.approx(0.0, abs=0.1)

        run_virtual(main())

    @pytest.mark.parametrize("ahead", [0, 1])
    @pytest.mark.parametrize(("lag", "paired"), [(0, False), (1, True)])
    def test_one_round_apart(self, ahead: int, lag: int, paired: bool) -> None:
        async def main() -> None:
            async with open_swarm(2, max_lag_rounds=lag) as swarm:
                rounds = {ahead: 6, 1 - ahead: 5}
                async with asyncio.TaskGroup() as group:
                    tasks = {i: group.create_task(swarm.exchange(i, round=rounds[i])) for i in (0, 1)}
                results = {i: task.result() for i, task in tasks.items()}
                assert swarm.check(results, rounds=rounds) == ({frozenset({0, 1})} if paired else set())
                assert all(result.outcome == ("averaged" if paired else "alone") for result in results.values())

        run_virtual(main())

    def test_two_rounds_apart_is_too_far(self) -> None:
        async def main() -> None:
            async with open_swarm(2) as swarm:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(swarm.exchange(i, round=5 + 2 * i)) for i in (0, 1)]
                assert [task.result().outcome for task in tasks] == ["alone", "alone"]

        run_virtual(main())

    def test_who_is_done_with_the_round_turns_a_late_comer_down_at_once(self) -> None:
        async def main() -> None:
            async with open_swarm(3, network=MemoryNetwork(link=LinkSpec(latency_s=0.01))) as swarm:
                first = ranking(RUN.encode(), 5, swarm.ids[0], swarm.ids[:2])[0]
                assert first == swarm.ids[1]
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self.one(swarm, i, at_s=10.0 * (i == 2))) for i in range(3)]
                assert [task.result().outcome for task in tasks] == ["averaged", "averaged", "alone"]
                assert tasks[2].result().seconds < 1.0

        run_virtual(main())

    @staticmethod
    async def one(swarm: Swarm, index: int, *, at_s: float) -> ExchangeResult:
        await asyncio.sleep(at_s)
        candidates = swarm.ids if index == 2 else swarm.ids[:2]
        update = make_update(swarm.ids[index])
        now_s = asyncio.get_running_loop().time()
        return await swarm.averagers[index].exchange(update, candidates=candidates, deadline_s=now_s + 60.0)

    def test_one_ahead_is_kept_at_the_door_for_the_next_round(self) -> None:
        async def main() -> None:
            async with open_swarm(3, network=MemoryNetwork(link=LinkSpec(latency_s=0.01))) as swarm:
                async with asyncio.TaskGroup() as group:
                    pair = [group.create_task(self.one(swarm, i, at_s=0.0)) for i in (0, 1)]
                    ahead = group.create_task(swarm.exchange(2, round=6, at_s=5.0))
                    again = group.create_task(swarm.exchange(0, round=6, at_s=40.0))
                assert [task.result().outcome for task in pair] == ["averaged", "averaged"]
                rounds = {0: 6, 2: 6}
                assert swarm.check({2: ahead.result(), 0: again.result()}, rounds=rounds) == {frozenset({0, 2})}

        run_virtual(main())

    def test_one_straggler_does_not_keep_the_others_from_pairing(self) -> None:
        async def main() -> None:
            async with open_swarm(9, network=MemoryNetwork(link=LinkSpec(latency_s=0.01))) as swarm:
                for round in range(5, 10):
                    async with asyncio.TaskGroup() as group:  # the last peer never begins
                        tasks = {i: group.create_task(swarm.exchange(i, round=round)) for i in range(8)}
                    results = {i: task.result() for i, task in tasks.items()}
                    assert len(swarm.check(results, rounds=dict.fromkeys(range(8), round))) == 4
                    assert max(result.seconds for result in results.values()) < 50.0

        run_virtual(main())


class TestNetworkFaults:
    def test_nobody_answers(self) -> None:
        async def main() -> None:
            async with open_swarm(3, num_silent=2) as swarm:
                result = await swarm.exchange(0)
                assert (result.outcome, result.attempts) == ("alone", 2)

        run_virtual(main())

    def test_a_candidate_that_never_gets_there_costs_the_deadline(self) -> None:
        async def main() -> None:
            async with open_swarm(2) as swarm:
                result = await swarm.exchange(0, deadline_s=7.0)
                assert result.outcome == "timeout"
                assert result.seconds == pytest.approx(7.0)
                late = await swarm.exchange(1, deadline_s=7.0)
                assert late.outcome == "alone"

        run_virtual(main())

    def test_a_deadline_in_the_past_returns_at_once(self) -> None:
        async def main() -> None:
            async with open_swarm(2) as swarm:
                result = await swarm.exchange(0, deadline_s=-1.0)
                assert result.outcome == "timeout"
                assert result.seconds == pytest.approx(0.0)

        run_virtual(main())

    def test_a_link_too_slow_for_the_deadline(self) -> None:
        async def main() -> None:
            network = MemoryNetwork(link=LinkSpec(latency_s=0.05, bytes_per_s=100_000.0))
            async with open_swarm(2, network=network, num_bytes=(3 << 20, 1 << 20)) as swarm:
                results = await swarm.exchange_each(deadline_s=20.0)
                assert [result.outcome for result in results] == ["timeout", "timeout"]
                assert all(result.partner is not None for result in results)
                assert max(result.seconds for result in results) < 20.5

        run_virtual(main())

    def test_a_slow_link_in_time(self) -> None:
        results = []

        async def main() -> None:
            network = MemoryNetwork(link=LinkSpec(latency_s=0.05, bytes_per_s=400_000.0))
            async with open_swarm(2, network=network, num_bytes=(3 << 20, 1 << 20)) as swarm:
                results.extend(await swarm.exchange_each(deadline_s=30.0))
                swarm.check(dict(enumerate(results)))

        run_virtual(main())
        assert [result.outcome for result in results] == ["averaged", "averaged"]
        assert results[0].seconds == pytest.approx((4 << 20) / 400_000.0, rel=0.1)  # both directions at once

    def test_halves_of_a_partition_pair_among_themselves_and_together_again_after(self) -> None:
        async def main() -> None:
            network = MemoryNetwork(link=LinkSpec(latency_s=0.01))
            async with open_swarm(8, network=network) as swarm:
                network.partition(set(swarm.ids[:4]), set(swarm.ids[4:]))
                results = dict(enumerate(await swarm.exchange_each(deadline_s=120.0)))
                pairs = swarm.check(results)
                assert len(pairs) == 4
                assert all(max(pair) < 4 or min(pair) >= 4 for pair in pairs)
                network.heal()
                crossing = 0
                for round in range(6, 12):
                    results = dict(enumerate(await swarm.exchange_each(round=round)))
                    pairs = swarm.check(results, rounds=dict.fromkeys(range(8), round))
                    assert len(pairs) == 4
                    crossing += sum(min(pair) < 4 <= max(pair) for pair in pairs)
                assert crossing >= 6

        run_virtual(main())

    @pytest.mark.parametrize("seed", range(8))
    def test_lossy_links_never_raise_and_leave_at_most_the_last_receipt_in_doubt(self, seed: int) -> None:
        async def main() -> None:
            network = MemoryNetwork(seed=seed, link=LinkSpec(latency_s=0.01, loss=0.05))
            async with open_swarm(8, network=network) as swarm:
                results = await swarm.exchange_each(deadline_s=30.0)
                for index, result in enumerate(results):
                    if result.outcome == "averaged":
                        assert result.partner is not None
                        other = results[swarm.ids.index(result.partner)]
                        assert other.partner == swarm.ids[index]
                        assert other.outcome in ("averaged", "lost")
                assert not any(averager.violations for averager in swarm.averagers)

        run_virtual(main())

    @pytest.mark.parametrize("step", range(30))
    def test_a_crash_at_any_moment(self, step: int) -> None:
        """Peer 1 dies 10 ms × step into an exchange that takes about 200 ms: its partner knows at once."""

        async def main() -> None:
            network = MemoryNetwork(link=LinkSpec(latency_s=0.02, bytes_per_s=50_000.0))
            async with open_swarm(2, network=network) as swarm:
                async with asyncio.TaskGroup() as group:
                    survivor = group.create_task(swarm.exchange(0))
                    victim = group.create_task(swarm.exchange(1))
                    await asyncio.sleep(0.01 * step)
                    network.crash(swarm.ids[1])
                result = survivor.result()
                assert result.outcome in ("averaged", "lost", "alone")
                assert result.seconds < 0.01 * step + 0.5
                if result.outcome == "averaged":
                    assert step > 5
                assert victim.result().outcome in ("averaged", "lost", "alone", "timeout")

        run_virtual(main())

    def test_cancelling_an_exchange_frees_the_partner_and_the_door(self) -> None:
        async def main() -> None:
            network = MemoryNetwork(link=LinkSpec(latency_s=0.02, bytes_per_s=1000.0))
            async with open_swarm(2, network=network) as swarm:
                async with asyncio.TaskGroup() as group:
                    other = group.create_task(swarm.exchange(0))
                    ours = group.create_task(swarm.exchange(1))
                    await asyncio.sleep(1.0)
                    ours.cancel()
                assert ours.cancelled()
                assert other.result().outcome == "lost"
                assert other.result().seconds < 6.0  # what was on the way still arrives
                results = dict(enumerate(await swarm.exchange_each(round=6)))
                assert len(swarm.check(results, rounds={0: 6, 1: 6})) == 1

        run_virtual(main())
