"""Members that die, stall, are late, or are not seen by all: never an exception, never past the deadline, never two stories."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
import torch

from averaging.allreduce import GroupResult
from averaging.allreduce_transfer import Transfer
from protocol.errors import PeerUnreachableError
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from protocol.transport import Stream
from protocol.virtual_time import run_virtual
from tests.averaging.group_members import NUMEL, Members, decoded, open_members

SLOW = LinkSpec(latency_s=0.05, bytes_per_s=20_000.0)
"""A round of five takes 0.95 s on it: 0.2 s until the group stands, 0.3 s for the parts, as long for the means, then echoes."""


def check_agreement(members: Members, results: Mapping[int, GroupResult]) -> None:
    """Wherever one of these peers has a mean, all have the same one; elsewhere each has its own Δ."""
    own_parts = [set(result.own_parts) for result in results.values()]
    assert all(parts == own_parts[0] for parts in own_parts), [dict(result.own_parts) for result in results.values()]
    shared = torch.ones(NUMEL, dtype=torch.bool)
    for start, stop in own_parts[0]:
        shared[start:stop] = False
    assert shared.any()
    means = {index: decoded(result.mean, members.codec) for index, result in results.items()}
    first = next(iter(means.values()))
    for index, mean in means.items():
        assert torch.equal(mean[shared], first[shared])
        assert torch.equal(mean[~shared], members.sent(index)[~shared])


@pytest.mark.parametrize(
    "crash_s", [0.0, 0.07, 0.12, 0.17, 0.21, 0.25, 0.3, 0.42, 0.5, 0.55, 0.6, 0.65, 0.7, 0.73, 0.8, 0.84, 0.88, 0.92]
)
@pytest.mark.parametrize("victim", [4, 0])
def test_a_member_that_dies_costs_at_most_its_own_part(crash_s: float, victim: int) -> None:
    async def main() -> None:
        network = MemoryNetwork(link=SLOW)
        async with open_members(5, network=network) as members:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(members.reduce(index)) for index in range(5)]
                await asyncio.sleep(crash_s)
                network.crash(members.ids[victim])
            results = {index: tasks[index].result() for index in range(5) if index != victim}
            check_agreement(members, results)
            assert all(len(result.own_parts) <= 1 for result in results.values())
            assert max(result.seconds for result in results.values()) < 3.0
            assert not any(members.averagers[index].violations for index in results)

    run_virtual(main())


@pytest.mark.parametrize("crash_s", [0.86, 0.9, 1.0, 1.1])
def test_what_a_dead_owner_told_one_the_others_get_from_that_one(crash_s: float) -> None:
    async def main() -> None:
        network = MemoryNetwork(link=SLOW)
        async with open_members(4, network=network) as members:
            for other in (0, 1):
                network.set_link(members.ids[3], members.ids[other], LinkSpec(latency_s=0.05, bytes_per_s=14_000.0))
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(members.reduce(index)) for index in range(4)]
                await asyncio.sleep(crash_s)
                held = [index for index in range(3) if _transfer_of(members, index).ledger.holds(3)]
                network.crash(members.ids[3])
            results = {index: tasks[index].result() for index in range(3)}
            check_agreement(members, results)
            assert [bool(result.own_parts) for result in results.values()] == [not held] * 3

    run_virtual(main())


def _transfer_of(members: Members, index: int) -> Transfer:
    round = members.averagers[index]._round
    assert round is not None
    assert round._transfer is not None
    return round._transfer


def test_who_is_gone_is_found_out_within_seconds() -> None:
    async def main() -> None:
        async with open_members(5, num_silent=2) as members:
            for result in await members.reduce_each():
                assert result.outcome == "averaged"
                assert set(result.missing) == set(members.ids[3:])
                assert set(result.peers) < set(members.ids[:3])
                assert result.seconds < 2.0

    run_virtual(main())


def test_one_failed_dial_does_not_cost_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = MemoryTransport.open

    async def open_at_the_second_attempt(self: MemoryTransport, peer: PeerId, protocol: str) -> Stream:
        opened.append(f"{self.peer_id} {peer}")
        if opened.count(opened[-1]) == 1:
            raise PeerUnreachableError("not listening yet")
        return await real(self, peer, protocol)

    async def main() -> None:
        async with open_members(3) as members:
            monkeypatch.setattr(MemoryTransport, "open", open_at_the_second_attempt)
            assert [result.outcome for result in await members.reduce_each()] == ["averaged"] * 3

    run_virtual(main())


def test_a_peer_that_never_begins_costs_the_gathering() -> None:
    async def main() -> None:
        async with open_members(4) as members:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(members.reduce(index, deadline_s=50.0)) for index in (0, 1, 3)]
            for task in tasks:
                assert task.result().outcome == "averaged"
                assert task.result().missing == {members.ids[2]: "did not come in time"}
                assert task.result().seconds == pytest.approx(25.0, abs=0.5)

    run_virtual(main())


@pytest.mark.parametrize("late", [0, 2])
def test_a_late_comer_joins_while_the_group_gathers_and_is_turned_away_afterwards(late: int) -> None:
    async def main(at_s: float) -> list[GroupResult]:
        async with open_members(3) as members:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(members.reduce(index, at_s=at_s if index == late else 0.0)) for index in range(3)
                ]
            return [task.result() for task in tasks]

    in_time = run_virtual(main(20.0))
    assert [result.outcome for result in in_time] == ["averaged"] * 3
    assert len({bytes(result.mean or b"") for result in in_time}) == 1
    too_late = run_virtual(main(40.0))
    assert [result.outcome for result in too_late] == ["alone" if index == late else "averaged" for index in range(3)]
    assert too_late[late].seconds < 25.0
    assert all(too_late[late].missing.values())


def test_who_is_behind_is_told_and_who_is_ahead_waits_at_the_door() -> None:
    async def main() -> None:
        async with open_members(3) as members:
            async with asyncio.TaskGroup() as group:
                ahead = [group.create_task(members.reduce(index, round=6, deadline_s=100.0)) for index in (0, 2)]
                behind = group.create_task(members.reduce(1, round=5, deadline_s=10.0, at_s=1.0))
                again = group.create_task(members.reduce(1, round=6, deadline_s=80.0, at_s=20.0))
            assert behind.result().outcome == "alone"
            assert "passed" in behind.result().missing[members.ids[2]]
            results = [ahead[0].result(), again.result(), ahead[1].result()]
            assert [result.outcome for result in results] == ["averaged"] * 3
            assert len({bytes(result.mean or b"") for result in results}) == 1

    run_virtual(main())


def test_views_that_differ_and_a_broken_link_do_not_split_the_group() -> None:
    async def main() -> None:
        network = MemoryNetwork(link=LinkSpec(latency_s=0.01))
        async with open_members(5, network=network) as members:
            network.set_link(members.ids[1], members.ids[2], LinkSpec(latency_s=0.01, loss=1.0))
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(members.reduce(index, candidates=[0, 1, 2, 3] if index == 0 else None))
                    for index in range(5)
                ]
            results = [task.result() for task in tasks]
            assert [result.outcome for result in results] == ["averaged"] * 5, (
                "what did not come from its owner was fetched"
            )
            assert len({bytes(result.mean or b"") for result in results}) == 1
            assert set(results[0].peers) == set(members.ids[1:]), "in parts of which it owns none"

    run_virtual(main())


@pytest.mark.parametrize("stall_s", [0.05, 0.25, 0.5, 0.7])
def test_a_stalled_member_costs_no_more_than_the_deadline(stall_s: float) -> None:
    async def main() -> None:
        network = MemoryNetwork(link=SLOW)
        async with open_members(4, network=network) as members:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(members.reduce(index, deadline_s=20.0)) for index in range(4)]
                await asyncio.sleep(stall_s)
                network.partition([members.ids[3]])
            results = [task.result() for task in tasks[:3]]
            assert all(len(result.own_parts) <= 1 for result in results)
            assert {result.outcome for result in results} <= {"averaged", "partial"}
            assert max(result.seconds for result in results) <= 20.0
            check_agreement(members, dict(enumerate(results)))
            assert tasks[3].result().seconds <= 20.0

    run_virtual(main())


def test_a_link_too_slow_for_the_deadline_leaves_its_owner_out() -> None:
    async def main() -> None:
        network = MemoryNetwork(link=LinkSpec(latency_s=0.01))
        async with open_members(4, network=network) as members:
            for other in range(3):
                network.set_link(members.ids[3], members.ids[other], LinkSpec(latency_s=0.01, bytes_per_s=300.0))
            results = await members.reduce_each(deadline_s=20.0)
            fast = results[:3]
            assert {result.outcome for result in fast} == {"partial"}
            check_agreement(members, dict(enumerate(fast)))
            for result in fast:
                [(_, stop)] = result.own_parts
                assert stop == NUMEL, "the last id owns the last part"
                assert result.seconds <= 20.0
                assert set(result.peers) < set(members.ids[:3]), "its Δ came too late"
            assert results[3].seconds <= 20.0

    run_virtual(main())


@pytest.mark.parametrize("seed", range(6))
def test_lossy_links_never_raise(seed: int) -> None:
    async def main() -> None:
        lossy = MemoryNetwork(seed=seed, link=LinkSpec(latency_s=0.01, loss=0.03))
        async with open_members(6, network=lossy) as members:
            for round in range(3):
                for result in await members.reduce_each(round=round, deadline_s=10.0):
                    assert result.seconds <= 10.0
                    assert (result.mean is None) == (result.outcome == "alone")
                    assert bool(result.own_parts) == (result.outcome == "partial")
                    assert all(result.missing.values())
            assert not any(averager.violations for averager in members.averagers)

    run_virtual(main())


def test_two_groups_of_a_split_network_both_average() -> None:
    async def main() -> None:
        network = MemoryNetwork(link=LinkSpec(latency_s=0.01))
        async with open_members(5, network=network) as members:
            network.partition(members.ids[:2])
            results = await members.reduce_each(deadline_s=20.0)
            assert [result.outcome for result in results] == ["averaged"] * 5
            assert results[0].mean == results[1].mean
            assert results[2].mean == results[3].mean == results[4].mean
            network.heal()
            together = await members.reduce_each(round=6)
            assert len({bytes(result.mean or b"") for result in together}) == 1

    run_virtual(main())


def test_cancelling_a_round_leaves_the_averager_usable_and_the_others_go_on() -> None:
    async def main() -> None:
        async with open_members(3, network=MemoryNetwork(link=SLOW)) as members:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(members.reduce(index)) for index in range(3)]
                await asyncio.sleep(0.3)
                tasks[1].cancel()
            assert tasks[1].cancelled()
            assert {tasks[0].result().outcome, tasks[2].result().outcome} == {"partial"}
            again = await members.reduce_each(round=6)
            assert {result.outcome for result in again} == {"averaged"}

    run_virtual(main())


def test_a_deadline_that_has_passed_ends_at_once() -> None:
    async def main() -> None:
        async with open_members(3) as members:
            for result in await members.reduce_each(deadline_s=-1.0):
                assert (result.outcome, result.seconds) == ("alone", 0.0)

    run_virtual(main())
