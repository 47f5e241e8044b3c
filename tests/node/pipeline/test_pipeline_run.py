"""Whole peers train a model in stages, in virtual time: nobody holds all of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from node.peer import Summary
from node.role import memory_needed
from protocol.memory import LinkSpec
from protocol.virtual_time import run_virtual
from tests.node.memory_swarm import MemorySwarm
from tests.node.runs import tiny_run

STAGED: dict[str, Any] = {
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
    found = losses(swarm)
    assert sum(found[-4:]) / 4 < sum(found[:4]) / 4 - 0.3
    for stage in range(3):
        replicas = [peer.trainer for peer in peers if peer.progress.stage == stage]
        assert all(trainer is not None and trainer.tokens > 0 for trainer in replicas)
        thetas = [trainer.flat.theta for trainer in replicas if trainer is not None]
        assert float((thetas[0] - thetas[1]).norm() / thetas[0].norm()) < 1e-3, "consolidated"
        assert bool(torch.isfinite(thetas[0]).all())


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
