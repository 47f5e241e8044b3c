"""Whole swarms on the memory transport in virtual time: the node's real code from joining to farewell."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from node.demo_check import relative_spread
from node.simulation.demo import run_swarm
from protocol.virtual_time import run_virtual
from tests.node.memory_swarm import MemorySwarm, phi
from tests.node.runs import tiny_run


@pytest.mark.parametrize("num_peers", [1, 2, 3])
def test_swarm_trains_to_the_end(tmp_path: Path, num_peers: int) -> None:
    signed, store = tiny_run(tmp_path)
    # By the lots of seed 0 one of three peers is alone in the first three of four rounds, and too far from the others in the last.
    peers, summaries = run_virtual(run_swarm(signed, store, num_peers, seed=1))
    for summary in summaries:
        assert summary.finished
        assert summary.val_loss_start is not None
        assert summary.val_loss_end is not None
        assert summary.val_loss_end < summary.val_loss_start
    averaged = sum(summary.exchanges_ok for summary in summaries)
    assert averaged == (0 if num_peers == 1 else 2 * signed.manifest.sync.total_rounds)
    assert sum(summary.exchanges_failed for summary in summaries) == 0
    if num_peers > 1:
        assert relative_spread([phi(peer) for peer in peers]) < 0.5


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path, sync__total_rounds=2)
    first, _ = run_virtual(run_swarm(signed, store, 3, seed=1))
    second, _ = run_virtual(run_swarm(signed, store, 3, seed=1))
    assert all(torch.equal(phi(a), phi(b)) for a, b in zip(first, second, strict=True))


def test_a_stopped_peer_resumes_bit_for_bit(tmp_path: Path) -> None:
    # Without overlap: a session's last exchange is always waited for, so with it the outer step would come at another moment.
    signed, store = tiny_run(tmp_path, sync__overlap=False)
    whole = MemorySwarm(signed, store, tmp_path)
    run_virtual(whole.live("whole"))
    # The second life has the same identity, hence the same shards, under another folder.
    parts = MemorySwarm(signed, store, tmp_path / "again")
    (tmp_path / "again").mkdir()
    run_virtual(parts.live("whole", rounds=2))
    run_virtual(parts.live("whole"))
    assert parts.named("whole", "resumed")
    assert torch.equal(phi(whole.peers["whole"]), phi(parts.peers["whole"]))


def test_a_late_peer_takes_its_state_from_the_others(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path, sync__total_rounds=0)
    swarm = MemorySwarm(signed, store, tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in ("a", "b", "c"):
                tasks.create_task(swarm.live(name, rounds=30))
            await asyncio.sleep(12)
            await swarm.live("late", rounds=3, own_store=True)
            for name in ("a", "b", "c"):
                swarm.peers[name].stop()

    run_virtual(story())
    assert swarm.named("late", "state_adopted")
    late = swarm.summaries["late"]
    first = swarm.summaries["a"]
    assert late.val_loss_start is not None
    assert first.val_loss_start is not None
    assert late.val_loss_start < first.val_loss_start - 0.3, "it starts from what the others have learnt"


def test_a_crash_costs_the_others_nothing_but_the_partner(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path, sync__total_rounds=6)
    swarm = MemorySwarm(signed, store, tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            survivors = [tasks.create_task(swarm.live(name)) for name in ("a", "b")]
            victim = tasks.create_task(swarm.live("victim"))
            await asyncio.sleep(7)
            swarm.network.crash(swarm.peers["victim"].progress.peer)
            victim.cancel()
            await asyncio.wait(survivors)

    run_virtual(story())
    assert swarm.summaries["a"].finished
    assert swarm.summaries["b"].finished
    assert swarm.summaries["a"].exchanges_ok >= 2


@pytest.mark.parametrize("step_s", [0.9, 0.1], ids=["a slow one", "a fast one"])
def test_a_peer_of_another_speed_stays_with_the_swarm(tmp_path: Path, step_s: float) -> None:
    signed, store = tiny_run(tmp_path, sync__total_rounds=0, sync__inner_steps=10, sync__exchange_timeout_s=6.0)
    swarm = MemorySwarm(signed, store, tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in ("a", "b", "c"):
                tasks.create_task(swarm.live(name))
            tasks.create_task(swarm.live("other", step_s=step_s))
            await asyncio.sleep(30)
            for peer in swarm.peers.values():
                peer.stop()

    run_virtual(story())
    rounds = {name: peer.progress.round for name, peer in swarm.peers.items()}
    assert abs(rounds["other"] - rounds["a"]) <= 4, rounds
    other = swarm.summaries["other"]
    assert other.exchanges_ok >= 0.5 * other.rounds, other


def test_a_run_that_never_averages_neither_waits_nor_skips(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path, sync__total_rounds=0, sync__algorithm="local")
    swarm = MemorySwarm(signed, store, tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(swarm.live("slow", step_s=0.9))
            tasks.create_task(swarm.live("fast", step_s=0.1))
            await asyncio.sleep(30)
            for peer in swarm.peers.values():
                peer.stop()

    run_virtual(story())
    fast, slow = swarm.peers["fast"].progress.round, swarm.peers["slow"].progress.round
    assert fast > 4 * slow > 0
