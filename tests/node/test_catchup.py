"""How a joiner gets a state from the swarm, over a network."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from node.catchup import WAIT_FOR_STATE_S
from node.trainer import Trainer
from protocol.errors import TransportError
from protocol.ids import BlobId
from protocol.virtual_time import run_virtual
from tests.node.joiner import Scene, weights_like
from tests.node.swarm import neighbourhood, reference


def test_a_joiner_takes_the_agreed_state_and_the_swarms_round(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 5) as nodes:
            scene = Scene(trainer, nodes)
            good = reference(8, weights_like(trainer, 1.01), *nodes[1:4])
            lie = reference(10**9, weights_like(trainer, 0.99), nodes[4])
            await scene.show({1: [good], 2: [good], 3: [good], 4: [lie]}, round=9)
            expected = trainer.replica.phi * 1.01
            assert await scene.fetcher.fetch() == good
            assert torch.equal(trainer.replica.phi, expected)
            assert trainer.round == 9

    run_virtual(story())


def test_a_state_that_is_worse_than_guessing_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    """Even when enough peers vouch for it; and then the next credible one is taken."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 4) as nodes:
            scene = Scene(trainer, nodes)
            bad = reference(8, weights_like(trainer, 30.0), *nodes[1:])
            good = reference(4, weights_like(trainer, 1.01), *nodes[1:])
            await scene.show({1: [good, bad], 2: [good, bad], 3: [good, bad]})
            assert await scene.fetcher.fetch() == good
            (refusal,) = scene.named("state_refused")
            assert "held-out loss" in str(refusal["reason"])
            assert nodes[0].store.blobs() == [good.root], "what is refused takes no room"

    run_virtual(story())


@pytest.mark.parametrize("data", [b"no weights at all", b""], ids=["garbage", "empty"])
def test_garbage_is_refused_and_nothing_is_started_from_scratch(trainer: Trainer, tmp_path: Path, data: bytes) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 4) as nodes:
            scene = Scene(trainer, nodes)
            bad = reference(8, data, *nodes[1:])
            await scene.show({1: [bad], 2: [bad], 3: [bad]})
            before = trainer.replica.phi.clone()
            with pytest.raises(TransportError, match="at round"):
                await scene.fetcher.fetch()
            assert torch.equal(trainer.replica.phi, before)
            assert len(scene.named("state_refused")) == 1, "it is not tried again"

    run_virtual(story())


def test_a_joiner_waits_a_little_for_votes(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> float:
        async with neighbourhood(tmp_path, 5) as nodes:
            scene = Scene(trainer, nodes)
            good = reference(8, weights_like(trainer, 1.01), *nodes[1:4])
            await scene.show({1: [good], 2: [], 3: [], 4: []})
            loop = asyncio.get_running_loop()
            began_s = loop.time()
            fetch = asyncio.ensure_future(scene.fetcher.fetch())
            await asyncio.sleep(3.0)
            assert not fetch.done()
            await scene.show({1: [good], 2: [good], 3: [good], 4: []})
            assert await fetch == good
            return loop.time() - began_s

    assert run_virtual(story()) < WAIT_FOR_STATE_S


def test_without_credible_states_it_does_not_start_beside_the_swarm(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 5) as nodes:
            scene = Scene(trainer, nodes)
            lie = reference(10**9, weights_like(trainer, 0.99), *nodes[3:])
            await scene.show({1: [], 2: [], 3: [lie], 4: [lie]})
            before = trainer.replica.phi.clone()
            with pytest.raises(TransportError, match="try again"):
                await scene.fetcher.fetch()
            assert torch.equal(trainer.replica.phi, before)

    run_virtual(story())


def test_a_run_that_has_just_begun_is_not_waited_for(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 3) as nodes:
            scene = Scene(trainer, nodes)
            await scene.show({1: [], 2: []}, round=1)
            began_s = asyncio.get_running_loop().time()
            assert await scene.fetcher.fetch() is None
            assert asyncio.get_running_loop().time() - began_s < 2.0

    run_virtual(story())


def test_the_swarms_round_is_the_median_of_what_trainers_claim(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 6) as nodes:
            scene = Scene(trainer, nodes)
            assert scene.fetcher.swarm_round() is None
            await scene.show({1: []}, round=7)
            await scene.show({2: [], 3: []}, round=8)
            await scene.show({4: []}, round=10**9)
            await scene.directory.refresh()
            assert scene.fetcher.swarm_round() == 8

    run_virtual(story())


def test_a_state_that_cannot_be_had_just_now_is_tried_again(trainer: Trainer, tmp_path: Path) -> None:
    """Three peers vouch for it, but their disks do not give it out yet; it is told once and asked for until it comes."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 4) as nodes:
            scene = Scene(trainer, nodes)
            data = weights_like(trainer, 1.01)
            good = reference(8, data, nodes[1])
            nodes[1].store.remove(BlobId(good.root))
            await scene.show({1: [good], 2: [good], 3: [good]})
            fetch = asyncio.ensure_future(scene.fetcher.fetch())
            await asyncio.sleep(5.0)
            assert not fetch.done()
            for node in nodes[1:]:
                node.store.put(data)
            assert await fetch == good
            assert len(scene.named("state_unavailable")) == 1
            assert scene.named("state_refused") == []

    run_virtual(story())


def test_a_liar_seen_first_does_not_decide_how_far_the_swarm_is(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 4) as nodes:
            scene = Scene(trainer, nodes)
            await scene.show({3: []}, round=10**9)
            fetch = asyncio.ensure_future(scene.fetcher.fetch())
            await asyncio.sleep(0.6)
            await scene.show({1: [], 2: []}, round=1)
            assert await fetch is None
            assert scene.fetcher.swarm_round() == 1

    run_virtual(story())


def test_a_training_peer_takes_the_swarm_s_weights_and_keeps_its_round(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 4) as nodes:
            scene = Scene(trainer, nodes)
            trainer.round = 11
            trainer.optimizer.state[next(trainer.model.parameters())] = {"step": torch.tensor(3.0)}
            bad = reference(8, weights_like(trainer, 30.0), *nodes[1:])
            good = reference(4, weights_like(trainer, 1.01), *nodes[1:])
            await scene.show({1: [bad], 2: [bad], 3: [bad]})
            assert await scene.fetcher.refetch() is None
            assert await scene.fetcher.refetch() is None
            assert len(scene.named("state_refused")) == 1, "what was bad is not fetched again every round"
            expected = trainer.replica.phi * 1.01
            await scene.show({1: [good, bad], 2: [good, bad], 3: [good, bad]})
            assert await scene.fetcher.refetch() == good
            assert torch.equal(trainer.replica.phi, expected)
            assert torch.equal(trainer.flat.theta, expected)
            assert trainer.round == 11
            assert not trainer.optimizer.state

    run_virtual(story())


def test_whoever_wants_a_newer_state_takes_no_older_one_and_no_liar_s(trainer: Trainer, tmp_path: Path) -> None:
    """The usual votes are needed, however new a state is, and however much the others are said to have refused us."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 4) as nodes:
            scene = Scene(trainer, nodes)
            trainer.round = 20
            before = trainer.replica.phi.clone()
            old = reference(10, weights_like(trainer, 1.01), *nodes[1:3])
            lie = reference(19, weights_like(trainer, 0.99), nodes[3])
            await scene.show({1: [old], 2: [old], 3: [lie]}, round=20)
            assert await scene.fetcher.refetch(at_least=15) is None
            assert torch.equal(trainer.replica.phi, before)
            new = reference(18, weights_like(trainer, 1.02), *nodes[1:3])
            await scene.show({1: [old, new], 2: [old, new], 3: [lie]}, round=20)
            assert await scene.fetcher.refetch(at_least=15) == new
            assert torch.equal(trainer.replica.phi, before * 1.02)

    run_virtual(story())


def test_a_joiner_that_finds_no_state_wishes_for_one(trainer: Trainer, tmp_path: Path) -> None:
    """Where the last snapshot is worse than guessing and the next is far away, it would else give up."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 3) as nodes:
            scene = Scene(trainer, nodes)
            wishes: list[float] = []
            scene.fetcher._wish = lambda: wishes.append(asyncio.get_running_loop().time())
            bad = reference(0, weights_like(trainer, 30.0), *nodes[1:])
            await scene.show({1: [bad], 2: [bad]}, round=9)
            fetch = asyncio.ensure_future(scene.fetcher.fetch())
            await asyncio.sleep(10.0)
            assert len(wishes) == 1
            good = reference(9, weights_like(trainer, 1.01), *nodes[1:])
            await scene.show({1: [bad, good], 2: [bad, good]}, round=10)
            assert await fetch == good

    run_virtual(story())
