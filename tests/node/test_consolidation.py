"""The end of a run, with whole peers in virtual time: they come to one model, whatever some of them do."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from averaging.consolidation import Consolidation
from averaging.replica import Replica
from averaging.update import Update
from model.checkpoint import load_newest
from node import consolidation
from node.simulation.demo import run_swarm
from protocol.memory import LinkSpec
from protocol.virtual_time import run_virtual
from tests.node.memory_swarm import MemorySwarm, phi
from tests.node.runs import tiny_run

TOLERANCE = 1e-3
NAMES = ("a", "b", "c", "d")


def apart(models: Iterable[torch.Tensor]) -> float:
    """Largest ‖θi − θj‖/‖θi‖."""
    stack = torch.stack(list(models))
    return float(torch.cdist(stack, stack).max() / stack.norm(dim=1).min())


def tiny_swarm(folder: Path, **settings: object) -> MemorySwarm:
    signed, store = tiny_run(folder, **{"sync__total_rounds": 3} | settings)
    return MemorySwarm(signed, store, folder)


@pytest.mark.parametrize(("num_peers", "seed"), [(2, 0), (3, 0), (4, 0), (7, 0), (7, 4), (7, 5)])
def test_all_peers_end_with_one_model(tmp_path: Path, num_peers: int, seed: int) -> None:
    signed, store = tiny_run(tmp_path, sync__total_rounds=3)
    peers, summaries = run_virtual(run_swarm(signed, store, num_peers, seed=seed))
    assert apart(phi(peer) for peer in peers) < TOLERANCE
    for peer, summary in zip(peers, summaries, strict=True):
        assert summary.finished
        assert summary.consolidated is not None
        assert summary.consolidated.agreed
        assert summary.consolidated.distance is not None
        assert summary.consolidated.distance < TOLERANCE
        assert peer.trainer is not None
        assert torch.equal(peer.trainer.flat.theta, peer.trainer.replica.phi)
    assert {round(summary.val_loss_end or 0.0, 3) for summary in summaries} == {
        round(summaries[0].val_loss_end or 0, 3)
    }


@pytest.mark.parametrize("num_peers", [3, 4, 7])
def test_a_lossy_codec_of_the_run_leaves_time_for_whole_weights(tmp_path: Path, num_peers: int) -> None:
    """The final averaging sends fp32, eight times what the run's exchanges do, for which its deadline was chosen."""
    settings = {"sync__algorithm": "pair-average", "sync__slow_codec": "lattice", "sync__exchange_timeout_s": 3.0}
    swarm = tiny_swarm(tmp_path, **settings)
    swarm.network.default_link = LinkSpec(latency_s=0.01, bytes_per_s=2e4)
    names = "abcdefg"[:num_peers]

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in names:
                tasks.create_task(swarm.live(name))

    run_virtual(story())
    assert apart(phi(peer) for peer in swarm.peers.values()) < TOLERANCE
    assert all(end.consolidated is not None and end.consolidated.agreed for end in swarm.summaries.values())


@pytest.mark.parametrize("attack", [math.nan, 1e20, 100.0, -1.0])
def test_one_liar_of_four_keeps_nobody_apart_and_gains_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: float
) -> None:
    swarm = tiny_swarm(tmp_path)
    before: list[torch.Tensor] = []

    class Liar(Consolidation):
        def pack(self, round: int) -> Update:
            update = super().pack(round)
            lie = torch.frombuffer(bytearray(update.slow), dtype=torch.float32) * attack
            return replace(update, slow=memoryview(bytearray(lie.numpy().tobytes())))

    def make(replica: Replica, *, tolerance: float) -> Consolidation:
        liar = swarm.peers["liar"].trainer
        kind = Liar if liar is not None and replica is liar.replica else Consolidation
        return kind(replica, tolerance=tolerance)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in (*NAMES[:3], "liar"):
                tasks.create_task(swarm.live(name))
            for name in NAMES[:3]:
                await swarm.until(name, "consolidating")
                before.append(phi(swarm.peers[name]))

    monkeypatch.setattr(consolidation, "Consolidation", make)
    run_virtual(story())
    honest = [phi(swarm.peers[name]) for name in NAMES[:3]]
    start = torch.stack(before)
    spread = (start - start.mean(0)).norm(dim=1).max()
    assert apart(honest) < TOLERANCE
    assert (torch.stack(honest).mean(0) - start.mean(0)).norm() < spread
    ends = [swarm.summaries[name].consolidated for name in NAMES[:3]]
    assert all(end is not None and end.agreed for end in ends)


def test_one_that_comes_after_the_others_have_left_does_not_claim_to_hold_their_model(tmp_path: Path) -> None:
    swarm = tiny_swarm(tmp_path, sync__total_rounds=6)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(swarm.live("late"))
            tasks.create_task(swarm.live("other"))
            async with asyncio.timeout(60):
                await swarm.until("late", "exchange")
                while swarm.peers["late"].progress.exchanges_ok == 0:  # noqa: ASYNC110  # virtual time
                    await asyncio.sleep(0.1)
            swarm.peers["other"].stop()

    run_virtual(story())
    assert swarm.summaries["late"].finished
    end = swarm.summaries["late"].consolidated
    assert end is not None
    assert (end.meetings, end.agreed) == (0, False)
    assert [fields["agreed"] for fields in swarm.named("late", "consolidated")] == [False]


@pytest.mark.parametrize("way", ["resumed", "adopted"])
def test_nor_does_one_whose_meetings_were_in_an_earlier_session_or_another_s(tmp_path: Path, way: str) -> None:
    swarm = tiny_swarm(tmp_path, sync__total_rounds=40, sync__snapshot_rounds=1)
    last = "late" if way == "resumed" else "joiner"

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in ("late", "other"):
                tasks.create_task(swarm.live(name))
            await swarm.until("other", "exchange", outcome="averaged")
            await swarm.reached(8)
            if way == "adopted":
                tasks.create_task(swarm.live(last))
                await swarm.until(last, "state_adopted")
            for name in ("late", "other"):
                swarm.peers[name].stop()
        if way == "resumed":
            await asyncio.sleep(60.0)  # until nobody's record is left
            await swarm.live(last)

    run_virtual(story())
    assert swarm.peers[last].progress.exchanges_ok == 0, "or this tests nothing"
    end = swarm.summaries[last].consolidated
    assert end is not None
    assert (end.meetings, end.agreed) == (0, False)


def test_without_it_they_would_end_apart(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path, sync__total_rounds=3, sync__consolidation_tolerance=0.0)
    peers, _ = run_virtual(run_swarm(signed, store, 5, seed=0))
    assert apart(phi(peer) for peer in peers) > 20 * TOLERANCE


def test_what_is_saved_and_reported_is_the_consolidated_model(tmp_path: Path) -> None:
    swarm = tiny_swarm(tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in NAMES[:3]:
                tasks.create_task(swarm.live(name))

    run_virtual(story())
    for name in NAMES[:3]:
        loaded = load_newest(tmp_path / name / "checkpoints")
        assert loaded is not None
        assert torch.equal(loaded.tensors["replica.phi"], phi(swarm.peers[name]))
        (end,) = swarm.named(name, "consolidated")
        assert end["agreed"]
        assert end["loss"] == pytest.approx(swarm.summaries[name].val_loss_end, abs=1e-4)
        trainer = swarm.peers[name].trainer
        assert trainer is not None
        assert trainer.evaluate() == pytest.approx(end["loss"], abs=1e-4)


def test_a_lone_peer_ends_at_once(tmp_path: Path) -> None:
    swarm = tiny_swarm(tmp_path)
    run_virtual(swarm.live("a"))
    assert swarm.summaries["a"].finished
    assert swarm.summaries["a"].consolidated is not None
    assert swarm.summaries["a"].consolidated.meetings == 0
    assert not swarm.named("a", "consolidating")


@pytest.mark.parametrize("settings", [{"sync__algorithm": "local"}, {"sync__consolidation_tolerance": 0.0}])
def test_a_run_that_does_not_want_it_does_without(tmp_path: Path, settings: dict[str, object]) -> None:
    signed, store = tiny_run(tmp_path, sync__total_rounds=2, **settings)
    _, summaries = run_virtual(run_swarm(signed, store, 3, seed=0))
    assert [summary.consolidated for summary in summaries] == [None] * 3


def test_one_that_dies_meanwhile_does_not_keep_the_others_apart(tmp_path: Path) -> None:
    swarm = tiny_swarm(tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            survivors = [tasks.create_task(swarm.live(name)) for name in NAMES]
            victim = tasks.create_task(swarm.live("victim"))
            await swarm.until("a", "consolidation", outcome="averaged")
            swarm.network.crash(swarm.peers["victim"].progress.peer)
            victim.cancel()
            await asyncio.wait(survivors)

    run_virtual(story())
    assert apart(phi(swarm.peers[name]) for name in NAMES) < TOLERANCE
    assert all(swarm.summaries[name].finished for name in NAMES)


def test_the_others_wait_for_one_that_is_a_round_behind(tmp_path: Path) -> None:
    swarm = tiny_swarm(tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in NAMES[:3]:
                tasks.create_task(swarm.live(name))
            tasks.create_task(swarm.live("slow", step_s=0.75))

    run_virtual(story())
    assert apart(phi(peer) for peer in swarm.peers.values()) < TOLERANCE


def test_they_do_not_wait_for_ever_for_one_that_never_ends(tmp_path: Path) -> None:
    """A peer whose compute hangs goes on telling everybody that it trains."""
    swarm = tiny_swarm(tmp_path)
    waited_s: list[float] = []

    async def story() -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            hanging = tasks.create_task(swarm.live("hanging", step_s=1000.0))
            others = [tasks.create_task(swarm.live(name)) for name in NAMES]
            for name in NAMES:
                await swarm.until(name, "consolidating")
            began_s = loop.time()
            await asyncio.wait(others)
            waited_s.append(loop.time() - began_s)
            hanging.cancel()

    run_virtual(story())
    sync = swarm.signed.manifest.sync
    assert waited_s[0] < sync.round_target_s + 20 * sync.exchange_timeout_s
    assert apart(phi(swarm.peers[name]) for name in NAMES) < TOLERANCE


def test_the_owner_can_leave_at_any_moment(tmp_path: Path) -> None:
    swarm = tiny_swarm(tmp_path)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            leaver, *_ = [tasks.create_task(swarm.live(name)) for name in NAMES]
            await swarm.until("a", "consolidation")
            began_s = asyncio.get_running_loop().time()
            swarm.peers["a"].stop()
            await leaver
            assert asyncio.get_running_loop().time() - began_s < 5.0

    run_virtual(story())
    assert swarm.summaries["a"].consolidated is None
    trainer = swarm.peers["a"].trainer
    assert trainer is not None
    assert torch.equal(trainer.flat.theta, trainer.replica.phi)
    assert apart(phi(swarm.peers[name]) for name in NAMES[1:]) < TOLERANCE


def test_a_peer_that_lost_its_way_takes_the_swarm_s_state(tmp_path: Path) -> None:
    """Something has spoilt its weights; nobody else is moved, and it is back among them a few rounds later."""
    swarm = tiny_swarm(tmp_path, sync__total_rounds=0, inner__lr=0.003)

    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in (*NAMES, "lost"):
                tasks.create_task(swarm.live(name))
            await asyncio.sleep(15)
            lost = swarm.peers["lost"].trainer
            assert lost is not None
            lost.replica.phi.mul_(30.0)
            lost.flat.theta.mul_(30.0)
            await swarm.until("lost", "state_adopted")
            await asyncio.sleep(10)
            for peer in swarm.peers.values():
                peer.stop()

    run_virtual(story())
    assert swarm.named("lost", "astray")
    assert not any(swarm.named(name, "astray") for name in NAMES)
    losses = {name: summary.val_loss_end or 0.0 for name, summary in swarm.summaries.items()}
    assert losses["lost"] < max(losses[name] for name in NAMES) + 0.2, losses
