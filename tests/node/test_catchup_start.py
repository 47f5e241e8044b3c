"""What a peer starts from: its own checkpoint, the state of the swarm, or the initial weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_checkpoint
from node.catchup import Start, find_start
from node.checkpoints import Checkpoints
from node.compute import VirtualCompute
from node.trainer import Trainer
from protocol.virtual_time import run_virtual
from tests.node.joiner import Scene, weights_like
from tests.node.swarm import neighbourhood, reference


async def start(scene: Scene, folder: Path) -> Start:
    checkpoints = Checkpoints(folder, compute=VirtualCompute(seconds_per_call=0.1), events=scene.events)
    return await find_start(scene.trainer, fetcher=scene.fetcher, checkpoints=checkpoints, events=scene.events)


@pytest.mark.parametrize(("swarm_round", "event"), [(25, "resumed"), (26, "state_adopted")])
def test_an_old_checkpoint_gives_way_to_the_swarm_s_state(
    trainer: Trainer, tmp_path: Path, swarm_round: int, event: str
) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 4) as nodes:
            scene = Scene(trainer, nodes)
            trainer.round = 5
            save_checkpoint(tmp_path / "saved", *trainer.checkpoint(None), generation=1)
            good = reference(swarm_round - 1, weights_like(trainer, 1.01), *nodes[1:])
            await scene.show({1: [good], 2: [good], 3: [good]}, round=swarm_round)
            found = await start(scene, tmp_path / "saved")
            assert [name for name, _ in scene.heard] == [event]
            assert found.adopted == (good if event == "state_adopted" else None)

    run_virtual(story())


def test_a_checkpoint_waits_for_the_directory_s_first_answer(trainer: Trainer, tmp_path: Path) -> None:
    """One empty look does not mean that the swarm is gone: it may be far ahead."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 4) as nodes:
            scene = Scene(trainer, nodes)
            save_checkpoint(tmp_path / "saved", *trainer.checkpoint(None), generation=1)
            good = reference(99, weights_like(trainer, 1.01), *nodes[1:])
            found = asyncio.ensure_future(start(scene, tmp_path / "saved"))
            await asyncio.sleep(0.3)
            await scene.show({1: [good], 2: [good], 3: [good]}, round=100)
            assert (await found).adopted == good

    run_virtual(story())


def test_old_weights_are_better_than_none(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 3) as nodes:
            scene = Scene(trainer, nodes)
            trainer.round = 5
            save_checkpoint(tmp_path / "saved", *trainer.checkpoint(None), generation=1)
            await scene.show({1: [], 2: []}, round=100)
            assert (await start(scene, tmp_path / "saved")).adopted is None
            assert scene.named("resumed")

    run_virtual(story())


def test_nobody_and_nothing_leaves_the_initial_weights(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 2) as nodes:
            scene = Scene(trainer, nodes)
            before = trainer.replica.phi.clone()
            assert await start(scene, tmp_path / "none") == Start()
            assert trainer.round == 0
            await scene.show({1: []}, round=1)
            assert await start(scene, tmp_path / "none") == Start()
            assert trainer.round == 1
            assert torch.equal(trainer.replica.phi, before)

    run_virtual(story())


class FakeRebuilder:
    """The other stages are in round 500; of ours somebody keeps a copy of that round, or nobody any."""

    def __init__(self, *, copy_round: int | None) -> None:
        self._copy_round = copy_round

    def swarm_round(self) -> int:
        return 500

    async def rebuild(self, *, newer_than: int | None = None) -> bool:
        return self._copy_round is not None and (newer_than is None or self._copy_round > newer_than)


@pytest.mark.parametrize(
    ("round", "copy_round", "way"),
    [(40, 30, "rebuilt"), (40, None, "resumed"), (490, 480, "resumed"), (490, 495, "rebuilt"), (490, None, "resumed")],
)
def test_a_lost_stage_goes_on_from_what_is_newest(
    trainer: Trainer, tmp_path: Path, round: int, copy_round: int | None, way: str
) -> None:
    """Nobody holds the stage: a checkpoint of one's own that is many rounds old, or older than a copy others keep, gives way."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 1) as nodes:
            scene = Scene(trainer, nodes)
            checkpoints = Checkpoints(
                tmp_path / "own", compute=VirtualCompute(seconds_per_call=0.1), events=scene.events
            )
            trainer.round = round
            with checkpoints.writing():
                await checkpoints.save(trainer, None, final=True)
            rebuilder = FakeRebuilder(copy_round=copy_round)
            start = await find_start(
                trainer, fetcher=scene.fetcher, checkpoints=checkpoints, events=scene.events, rebuilder=rebuilder
            )
            assert start.is_rebuilt == (way == "rebuilt")
            assert bool(scene.named("resumed")) == (way == "resumed")

    run_virtual(story())
