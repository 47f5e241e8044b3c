"""Whole swarms in which every round is one of everybody, not of a pair."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from averaging.admission import Distances, Verdict
from averaging.allreduce import GroupAverager, GroupResult
from averaging.averager import Averager, ExchangeResult
from averaging.replica import Outcome
from averaging.update import RemoteUpdate, Update
from node.averaging_round import GroupRounds, averaging_rounds, reduces
from node.peer import Summary
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.manifest import SyncSpec
from protocol.virtual_time import run_virtual
from tests.node.memory_swarm import MemorySwarm, phi
from tests.node.runs import tiny_run
from tests.protocol.samples import manifest

NAMES = ("one", "two", "three")


def group_swarm(folder: Path, **settings: Any) -> MemorySwarm:
    """A run for three peers, which are not to be made equal at its end by other means, nor apart by a lattice's own steps."""
    defaults = {
        "sync__algorithm": "diloco",
        "sync__slow_codec": "bf16",
        "sync__consolidation_tolerance": 0.0,
    }
    signed, store = tiny_run(folder, **(defaults | settings))
    return MemorySwarm(signed, store, folder)


def live_all(swarm: MemorySwarm) -> list[Summary]:
    async def main() -> list[Summary]:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(swarm.live(name)) for name in NAMES]
        return [task.result() for task in running]

    return run_virtual(main())


def rounds_of(swarm: MemorySwarm, name: str) -> list[tuple[str, int]]:
    """Outcome and members of a peer's group rounds."""
    return [(told["outcome"], told["members"]) for told in swarm.named(name, "group_round")]


def gap(swarm: MemorySwarm, *names: str) -> float:
    """Largest distance of a peer's φ from the first one's."""
    first, *others = [phi(swarm.peers[name]) for name in names]
    return max(float((other - first).norm()) for other in others)


# ---- which runs


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"algorithm": "diloco"}, True),
        ({"algorithm": "diloco", "delta_codec": "e3m0", "fragments": 2, "total_rounds": 4}, True),
        ({"algorithm": "diloco", "delta_codec": "topk"}, False),
        ({"algorithm": "diloco", "group": "pair"}, False),
        ({"algorithm": "sparseloco"}, False),
        ({"algorithm": "sparseloco", "delta_codec": "q4"}, True),
        ({"algorithm": "noloco", "group": "all"}, False),
        ({"algorithm": "pair-average", "group": "all"}, False),
        ({"algorithm": "local"}, False),
    ],
)
def test_the_all_reduce_is_for_runs_of_a_mean_delta(settings: dict[str, Any], expected: bool) -> None:
    assert reduces(SyncSpec(**settings)) is expected


def test_sparse_deltas_are_swapped_with_everybody(tmp_path: Path) -> None:
    swarm = group_swarm(tmp_path, sync__algorithm="sparseloco")
    summaries = live_all(swarm)
    assert not any(swarm.named(name, "group_round") for name in NAMES)
    assert [summary.exchanges_ok for summary in summaries] == [2 * 4] * 3


# ---- whole runs


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("fragments", [1, 2])
def test_all_end_with_the_same_bits_and_no_slow_weights_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool, fragments: int
) -> None:
    async def forbidden(*arguments: object, **options: object) -> ExchangeResult:
        raise AssertionError("a pair exchange in a run without a pull")

    monkeypatch.setattr(Averager, "exchange", forbidden)
    swarm = group_swarm(tmp_path, sync__gamma=0.0, sync__overlap=overlap, sync__fragments=fragments)
    summaries = live_all(swarm)
    assert all(rounds_of(swarm, name) == [("averaged", 3)] * 4 for name in NAMES)
    assert [summary.exchanges_ok for summary in summaries] == [2 * 4] * 3
    assert [summary.exchanges_failed for summary in summaries] == [0] * 3
    assert gap(swarm, *NAMES) == 0.0
    for summary in summaries:
        assert summary.val_loss_start is not None
        assert summary.val_loss_end is not None
        assert summary.val_loss_end < summary.val_loss_start


def test_the_wire_carries_two_thirds_twice_whatever_the_number(tmp_path: Path) -> None:
    swarm = group_swarm(tmp_path, sync__gamma=0.0, sync__snapshot_rounds=100)
    live_all(swarm)
    trainer = swarm.peers["one"].trainer
    assert trainer is not None
    delta_bytes, _ = trainer.replica.config.payload_bytes(trainer.flat.theta.numel())
    swaps = 4 * 2 * delta_bytes  # of four rounds, with two others
    for summary in swarm.summaries.values():
        assert 4 * (2 * 2 / 3) * delta_bytes < summary.sent_bytes < swaps


def test_slow_weights_are_exchanged_in_every_eighth_round(tmp_path: Path) -> None:
    swarm = group_swarm(tmp_path, sync__total_rounds=17, sync__inner_steps=2, sync__overlap=False)
    live_all(swarm)
    per_round = [
        sum(told["round"] == round for name in NAMES for told in swarm.named(name, "exchange")) for round in range(17)
    ]
    assert per_round == [8 if round in (7, 15) else 6 for round in range(17)]  # two of the three also meet as a pair
    assert gap(swarm, *NAMES) == 0.0


def test_who_dies_in_a_round_costs_a_part_and_the_others_come_together_again(tmp_path: Path) -> None:
    swarm = group_swarm(tmp_path, sync__total_rounds=12, sync__inner_steps=3, sync__overlap=False)
    gaps: dict[str, float] = {}

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            running = {name: tasks.create_task(swarm.live(name)) for name in NAMES}
            await swarm.until("three", "group_round", round=1)
            while not has_formed(swarm, "three"):  # noqa: ASYNC110 – virtual time costs nothing
                await asyncio.sleep(0.005)
            running["three"].cancel()
            for name in ("one", "two"):
                await swarm.until(name, "group_round", round=2)
            gaps["after"] = gap(swarm, "one", "two")

    run_virtual(main())
    outcomes = {name: rounds_of(swarm, name) for name in ("one", "two")}
    for name, told in outcomes.items():
        assert told[:2] == [("averaged", 3), ("averaged", 3)]
        assert told[2][0] == "partial"
        assert told[3:] == [("averaged", 2)] * 9
        lost = [note for note in swarm.named(name, "exchange") if note["outcome"] == "lost"]
        assert [(note["round"], note["partner"]) for note in lost] == [(2, swarm.peers["three"].progress.peer)]
        assert swarm.summaries[name].exchanges_failed == 1
    assert gaps["after"] > 0.0, "each took its own progress where the mean was lost"
    # The difference of their momenta, which nobody mends, feeds it and halves in seven rounds.
    assert gap(swarm, "one", "two") < 0.4 * gaps["after"]


def has_formed(swarm: MemorySwarm, name: str) -> bool:
    """Whether a peer is in the middle of a group round."""
    membership = swarm.peers[name]._membership
    assert membership is not None
    loop = membership._loop
    assert loop is not None
    assert isinstance(loop._averaging, GroupRounds)
    round = loop._averaging._group._round
    return round is not None and round._has_formed.is_set()


# ---- one round


OTHER = Identity.generate(bytes([2]) * 32).peer_id
UPDATE = Update(round=3, tokens=10, delta=memoryview(b"delta"), slow=memoryview(b"slow"))
ALONE = GroupResult(
    outcome="alone", mean=None, peers=(), tokens=10, missing={OTHER: "late"}, own_parts={}, members=(), seconds=1.0
)
DONE = replace(ALONE, outcome="averaged", mean=memoryview(b"mean!"), peers=(OTHER,), missing={}, members=(OTHER,))


class FakeGroup:
    """An all-reduce that ends as it is told to."""

    def __init__(self) -> None:
        self.result = DONE

    async def reduce(self, update: Update, **options: object) -> GroupResult:
        return self.result


class FakeAverager:
    """Always finds the first candidate."""

    def __init__(self) -> None:
        self.calls: list[tuple[Update, list[PeerId]]] = []

    async def exchange(self, update: Update, *, candidates: list[PeerId], deadline_s: float) -> ExchangeResult:
        self.calls.append((update, candidates))
        if not candidates:
            return ExchangeResult(outcome="alone", partner=None, remote=None, seconds=0.0, attempts=0)
        remote = RemoteUpdate(peer=OTHER, round=update.round, tokens=1, delta=memoryview(b""), slow=update.slow)
        return ExchangeResult(outcome="averaged", partner=OTHER, remote=remote, seconds=0.1, attempts=1)


def rounds(fragments: int = 1) -> tuple[GroupRounds, FakeGroup, FakeAverager]:
    group, averager = FakeGroup(), FakeAverager()
    run = manifest(sync={"algorithm": "diloco", "fragments": fragments})
    made = averaging_rounds(run, cast(Averager, averager), cast(GroupAverager, group))
    assert isinstance(made, GroupRounds)
    return made, group, averager


def applied(distance: float = 0.1) -> Outcome:
    """What the trainer says of a partner whose φ is so far away, in lengths of Δ."""
    verdict = Verdict(kind="averaged", distances=Distances(delta=0.0, slow=2.0 * distance, own=2.0))
    return Outcome(kind="averaged", verdicts={OTHER: verdict}, delta_norm=2.0, shift_norm=1.0)


async def test_alone_but_with_a_partner_the_mean_is_our_own_delta_as_sent() -> None:
    made, group, _ = rounds()
    group.result = ALONE
    first = await made.average(UPDATE, candidates=[OTHER], deadline_s=1.0)
    assert (first.group_mean, first.partners) == (None, [])  # the solo step
    [note] = made.conclude(first, replace(applied(), verdicts={}), round=3)
    assert (note.outcome, note.partner) == ("alone", None)
    second = await made.average(replace(UPDATE, round=4), candidates=[OTHER], deadline_s=1.0)
    assert second.group_mean == UPDATE.delta
    assert [partner.peer for partner in second.partners] == [OTHER]


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize(("distance", "expected"), [(0.1, [1, 2, 3, 4]), (1.0, [1, 2, 3, 4, 5, 6])])
async def test_after_a_bad_round_of_a_fragment_its_next_four_mend_or_more(
    fragments: int, distance: float, expected: list[int]
) -> None:
    made, group, averager = rounds(fragments)
    for cycle in range(7):
        for fragment in range(fragments):
            number = cycle * fragments + fragment
            group.result = ALONE if number == 0 else DONE
            averaged = await made.average(replace(UPDATE, round=number), candidates=[OTHER], deadline_s=1.0)
            met = [partner.peer for partner in averaged.partners]
            made.conclude(averaged, applied(distance) if met else replace(applied(), verdicts={}), round=number)
    mended = [update.round for update, candidates in averager.calls if candidates]
    assert mended == [fragments * cycle for cycle in expected]
    assert all((bytes(update.delta), bytes(update.slow)) == (b"", b"slow") for update, _ in averager.calls)


async def test_members_are_told_of_one_by_one_and_the_failed_ones_last() -> None:
    made, group, _ = rounds()
    gone, slow = (Identity.generate(bytes([number]) * 32).peer_id for number in (3, 4))
    group.result = replace(DONE, outcome="partial", members=(gone, slow, OTHER), missing={gone: "went away"})
    averaged = await made.average(UPDATE, candidates=[OTHER], deadline_s=1.0)
    notes = made.conclude(averaged, replace(applied(), verdicts={}), round=3)
    assert [(note.partner, note.outcome) for note in notes] == [
        (OTHER, "averaged"),
        (gone, "lost"),
        (slow, "timeout"),
    ]
