"""Whole peers train a model in stages, in virtual time: nobody holds all of it."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, patch

import pytest
import torch

from node.catchup import Start, find_start
from node.peer import Summary
from node.pipeline.balance import Balance
from node.pipeline.planning import Planning
from node.pipeline.trainer import StageTrainer
from node.role import memory_needed
from protocol.errors import TransportError
from protocol.memory import LinkSpec
from protocol.records import LinkNote
from protocol.virtual_time import run_virtual
from tests.node.memory_swarm import MemorySwarm
from tests.node.runs import tiny_run

STAGED: dict[str, Any] = {
    "inner__optimizer": "adamw",  # with Muon peers of unequal shares clip each other in runs this small (docs/LOG.md)
    "model__num_layers": 4,
    "pipeline__stages": 3,
    "pipeline__skip_ratio": 0.34,
    "pipeline__microbatches": 3,
    "pipeline__microbatch_sequences": 2,
    "pipeline__hop_timeout_s": 10.0,
    "pipeline__iteration_timeout_s": 60.0,
    "sync__exchange_timeout_s": 10.0,
    "sync__round_target_s": 10.0,
}


def losses(swarm: MemorySwarm) -> list[float]:
    """Training losses of the peers of stage 0, in order."""
    told = [fields["loss"] for name in swarm.events for fields in swarm.named(name, "step")]
    return [loss for loss in told if loss is not None]


def test_six_peers_train_three_stages(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path, **STAGED, sync__total_rounds=3)
    swarm = MemorySwarm(signed, store, tmp_path)

    async def story() -> list[Summary]:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(swarm.live(f"peer {number}", step_s=0.02)) for number in range(6)]
        return [task.result() for task in running]

    torch.set_num_threads(1)  # matrices this small are slower on several
    summaries = run_virtual(story())
    peers = list(swarm.peers.values())
    stages = sorted(peer.progress.stage for peer in peers if peer.progress.stage is not None)
    assert stages == [0, 0, 1, 1, 2, 2]
    assert all(summary.finished and summary.exchanges_ok >= 2 for summary in summaries), summaries
    measured = [(told["round"], told["loss"]) for name in swarm.events for told in swarm.named(name, "validation")]
    assert sorted(round for round, _ in measured) == [1, 2, 3], "one peer measures after each round"
    assert dict(measured)[3] < dict(measured)[1] < 5.8, "chance is ln 300 = 5.7"
    found = losses(swarm)
    assert sum(found[-4:]) / 4 < sum(found[:4]) / 4 - 0.3
    for stage in range(3):
        replicas = [peer.trainer for peer in peers if peer.progress.stage == stage]
        assert all(trainer is not None and trainer.tokens > 0 for trainer in replicas)
        thetas = [trainer.flat.theta for trainer in replicas if trainer is not None]
        assert float((thetas[0] - thetas[1]).norm() / thetas[0].norm()) < 1e-3, "consolidated"
        assert bool(torch.isfinite(thetas[0]).all())


def test_a_swarm_plans_for_itself(tmp_path: Path) -> None:
    """One of the peers makes a plan out of measured links; all follow it, and the microbatches go that way."""
    signed, store = tiny_run(tmp_path, **STAGED, sync__total_rounds=8)
    swarm = MemorySwarm(signed, store, tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(6):
                tasks.create_task(swarm.live(f"peer {number}", step_s=0.1))
            for number in range(6):
                await swarm.until(f"peer {number}", "training")
            await swarm.reached(7)
            links.extend({note.peer: note for note in peer.progress.links} for peer in swarm.peers.values())

    links: list[dict[str, LinkNote]] = []
    torch.set_num_threads(1)
    run_virtual(story())
    by_number: dict[int, set[str]] = {}
    for name in swarm.events:
        assert not swarm.named(name, "plan_refused")
        for told in swarm.named(name, "plan"):
            by_number.setdefault(told["number"], set()).add(told["planner"])
    assert set(by_number) >= {1, 2}
    assert all(len(planners) == 1 for planners in by_number.values()), by_number
    followers = [name for name in swarm.events if swarm.named(name, "plan")]
    assert len(followers) == 6
    assert len(links) == 6
    for notes in links:
        assert len(notes) >= 3
        assert all(0.009 < note.latency_s < 0.02 for note in notes.values()), "the network has 10 ms each way"


def test_a_mover_that_gets_no_state_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it came from it has one: it must not leave the swarm for having tried to help."""
    mover = "peer 0"

    def look(self: Balance, records: object, *, iteration: int) -> int | None:
        peer = swarm.peers[mover]
        is_first = self._peer == peer.progress.peer and not swarm.named(mover, "moving")
        return (self._stage + 1) % 2 if is_first and iteration >= 5 else None

    async def start(trainer: StageTrainer, **parts: Any) -> Start:
        if len(swarm.named(mover, "stage")) == 2 and trainer.stage == swarm.named(mover, "stage")[1]["stage"]:
            raise TransportError("none of its peers gives a state")
        return await find_start(trainer, **parts)

    monkeypatch.setattr(Balance, "look", look)
    monkeypatch.setattr("node.shared_state.find_start", start)
    settings = STAGED | {"pipeline__stages": 2, "pipeline__skip_ratio": 0.0}
    signed, store = tiny_run(tmp_path, **settings, sync__total_rounds=8)
    swarm = MemorySwarm(signed, store, tmp_path)

    async def story() -> list[Summary]:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(swarm.live(f"peer {number}", step_s=0.1)) for number in range(4)]
        return [task.result() for task in running]

    torch.set_num_threads(1)
    assert all(summary.finished for summary in run_virtual(story()))
    (first, second, third) = [told["stage"] for told in swarm.named(mover, "stage")]
    assert first == third != second
    assert swarm.named(mover, "resumed")


def test_a_mover_lets_go_of_its_old_stage_before_it_takes_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chose by the memory that one stage takes."""
    mover = "peer 0"
    held: list[weakref.ref[StageTrainer]] = []
    left_over: list[StageTrainer | None] = []

    def look(self: Balance, records: object, *, iteration: int) -> int | None:
        is_first = self._peer == swarm.peers[mover].progress.peer and not swarm.named(mover, "moving")
        return (self._stage + 1) % 2 if is_first and iteration >= 5 else None

    async def start(trainer: StageTrainer, **parts: Any) -> Start:
        if swarm.peers[mover].trainer is trainer:
            left_over.extend(each() for each in held)
            held.append(weakref.ref(trainer))
        return await find_start(trainer, **parts)

    monkeypatch.setattr(Balance, "look", look)
    monkeypatch.setattr("node.shared_state.find_start", start)
    settings = STAGED | {"pipeline__stages": 2, "pipeline__skip_ratio": 0.0}
    signed, store = tiny_run(tmp_path, **settings, sync__total_rounds=4)
    swarm = MemorySwarm(signed, store, tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(swarm.live(f"peer {number}", step_s=0.1))

    torch.set_num_threads(1)
    run_virtual(story())
    assert len(held) == 2
    assert left_over == [None]


@pytest.mark.parametrize("source", ["snapshot", "neighbours"])
def test_a_stage_that_lost_all_its_peers_is_rebuilt(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both peers of stage 1 die. Another one takes the stage over, from a copy or from its neighbours, and training goes on."""
    if source == "neighbours":
        monkeypatch.setattr("node.pipeline.archive.StageArchive.look", _keep_nothing)
    signed, store = tiny_run(tmp_path, **STAGED, sync__total_rounds=0)
    swarm = MemorySwarm(signed, store, tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            lives = {
                f"peer {number}": tasks.create_task(
                    swarm.live(f"peer {number}", step_s=0.3, own_store=number > 0)  # the first has the data
                )
                for number in range(6)
            }
            for name in lives:
                await swarm.until(name, "training")
            await swarm.reached(5)
            for name, peer in list(swarm.peers.items()):
                if peer.progress.stage == 1:
                    swarm.network.crash(peer.progress.peer)
                    lives.pop(name).cancel()
                    del swarm.peers[name]
            assert len(lives) == 4
            await asyncio.wait(
                [tasks.create_task(swarm.until(name, "stage_rebuilt")) for name in lives],
                return_when=asyncio.FIRST_COMPLETED,
            )
            marks.update({name: len(swarm.named(name, "step")) for name in lives})
            await swarm.reached(max(peer.progress.round for peer in swarm.peers.values()) + 3)
            raise _TheEndError

    marks: dict[str, int] = {}
    torch.set_num_threads(1)
    with contextlib.suppress(ExceptionGroup):  # peers that were given up end in errors of their own
        run_virtual(story())
    assert marks
    (rebuilt,) = [told for name in marks for told in swarm.named(name, "stage_rebuilt")]
    assert (rebuilt["stage"], rebuilt["source"]) == (1, source)
    assert sorted(peer.progress.stage or 0 for peer in swarm.peers.values()) in ([0, 0, 1, 2], [0, 1, 2, 2])
    told = {name: [each["loss"] for each in swarm.named(name, "step")] for name in marks}
    first = [loss for losses in told.values() for loss in losses[:5] if loss is not None]
    after = [loss for name, losses in told.items() for loss in losses[marks[name] :] if loss is not None]
    assert sum(after[-10:]) / 10 < sum(first) / len(first) - 0.3, "what was learnt is kept"


class _TheEndError(Exception):
    """Ends the run of a swarm that would go on for ever."""


async def _keep_nothing(self: object) -> None:
    pass


def test_a_cut_link_costs_a_few_iterations_time_and_not_all_of_them(tmp_path: Path) -> None:
    """Between a peer of stage 0 and one of stage 1; each still reaches the other's replica."""
    signed, store = tiny_run(
        tmp_path, **STAGED | {"pipeline__stages": 2, "pipeline__skip_ratio": 0.0}, sync__total_rounds=6
    )
    swarm = MemorySwarm(signed, store, tmp_path)
    names = [f"peer {number}" for number in range(4)]
    cut_at = 8

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in names:
                tasks.create_task(swarm.live(name, step_s=0.02))
            for name in names:
                await swarm.until(name, "iteration", number=cut_at)
            stages = {peer.progress.stage: peer.progress.peer for peer in swarm.peers.values()}
            swarm.network.set_link(stages[0], stages[1], LinkSpec(latency_s=1e6))

    torch.set_num_threads(1)
    # Without a plan both origins use both replicas. A plan may give each origin a replica to itself, and then nobody waits for
    # the one that is cut off.
    with patch.object(Planning, "_make", AsyncMock()):
        run_virtual(story())
    for name in names:
        told = [fields for fields in swarm.named(name, "iteration") if fields["number"] > cut_at + 1]
        assert told[-1]["number"] == 6 * 5 - 1
        assert len(told) > 15
        assert sum(fields["seconds"] > 2.0 for fields in told) < 5
        assert sum(fields["tokens"] > 0 for fields in told) > 12


def test_memory_decides_what_a_peer_may_take(tmp_path: Path) -> None:
    large = {"model__num_layers": 8, "model__hidden_size": 64, "model__intermediate_size": 128}
    signed, store = tiny_run(tmp_path, **STAGED | large | {"pipeline__slots": 2})
    stages = [memory_needed(signed.manifest, stage) for stage in range(3)]
    assert max(stages) < 0.7 * memory_needed(signed.manifest, None)
    swarm = MemorySwarm(signed, store, tmp_path)
    with pytest.raises(ExceptionGroup) as caught:
        run_virtual(swarm.live("small", memory_bytes=int(min(stages))))
    assert "a stage of tiny needs about" in str(caught.value.exceptions[0])
