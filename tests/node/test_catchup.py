"""How a joiner gets its state, and whom it does not believe."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_checkpoint
from model.weights import encode_weights
from node.catchup import NUM_VOTES, WAIT_FOR_STATE_S, Start, StateFetcher, choose_snapshots, find_start
from node.checkpoints import Checkpoints
from node.compute import VirtualCompute
from node.trainer import Trainer
from protocol.directory import Directory
from protocol.errors import TransportError
from protocol.ids import BlobId
from protocol.records import SnapshotRef
from protocol.virtual_time import run_virtual
from tests.node.swarm import Node, listening, neighbourhood, reference, trainers
from tests.protocol.samples import identity, record

OLD = SnapshotRef(round=4, root="a" * 64, size_bytes=100)
NEW = SnapshotRef(round=8, root="b" * 64, size_bytes=100)
BEST_CLAIM = SnapshotRef(round=10**9, root="f" * 64, size_bytes=100)


@pytest.mark.parametrize("num_honest", [3, 4, 8])
@pytest.mark.parametrize("num_liars", [1, 2])
@pytest.mark.parametrize("num_copies", [0, 1, 3])
def test_liars_below_the_quorum_are_never_tried(num_honest: int, num_liars: int, num_copies: int) -> None:
    """However new their state is, and however few copies of the honest one there are yet."""
    offers = {number: [NEW] if number < num_copies else [] for number in range(num_honest)}
    offers |= {100 + number: [BEST_CLAIM] for number in range(num_liars)}
    assert num_liars < NUM_VOTES
    tried = [candidate.ref for candidate in choose_snapshots(trainers(offers))]
    assert tried == ([NEW] if num_copies == 3 else [])


def test_one_liar_cannot_vote_twice() -> None:
    offers = {0: [NEW], 1: [NEW], 2: [NEW], 3: [BEST_CLAIM, BEST_CLAIM]}
    assert [candidate.ref for candidate in choose_snapshots(trainers(offers))] == [NEW]


def test_a_liar_cannot_ride_on_an_honest_root() -> None:
    """A vote is for the round too: another round with the same bytes is another claim."""
    lie = NEW.model_copy(update={"round": 10**9})
    offers = {0: [NEW], 1: [NEW], 2: [NEW], 3: [lie]}
    assert [candidate.ref for candidate in choose_snapshots(trainers(offers))] == [NEW]


def test_the_newest_of_several_credible_states_comes_first() -> None:
    offers = {number: [OLD, NEW] for number in range(4)}
    best, second = choose_snapshots(trainers(offers))
    assert (best.ref, second.ref) == (NEW, OLD)
    assert best.voters == tuple(sorted(identity(number).peer_id for number in range(4)))


def test_in_a_small_swarm_all_must_agree_or_else_most() -> None:
    assert [c.ref for c in choose_snapshots(trainers({0: [NEW]}))] == [NEW]
    assert choose_snapshots(trainers({0: [NEW], 1: []})) == [], "one of two is no majority"
    assert [c.ref for c in choose_snapshots(trainers({0: [NEW], 1: [NEW], 2: [BEST_CLAIM]}))] == [NEW]
    both = choose_snapshots(trainers({0: [OLD, NEW], 1: [OLD, NEW], 2: [OLD]}))
    assert [c.ref for c in both] == [OLD, NEW], "all three before two of three"


def test_nobody_there() -> None:
    assert choose_snapshots({}) == []


def test_the_order_does_not_depend_on_the_order_of_records() -> None:
    offers = {number: [OLD, NEW] for number in range(6)}
    records = list(trainers(offers).items())
    expected = choose_snapshots(dict(records))
    random.Random(0).shuffle(records)
    assert choose_snapshots(dict(records)) == expected


# ---- the whole way, over a network


class Scene:
    """A joiner (node 0) among trainers that show what a test gives them."""

    def __init__(self, trainer: Trainer, nodes: list[Node]) -> None:
        self.trainer, self.nodes = trainer, nodes
        self.events, self.heard = listening()
        own = nodes[0]
        self.run = trainer.manifest.run_id
        self.directory = Directory(dht=own.transport.dht, identity=own.identity, run=self.run)
        self.fetcher = StateFetcher(
            trainer=trainer,
            compute=VirtualCompute(seconds_per_call=0.1),
            store=own.store,
            transport=own.transport,
            directory=self.directory,
            events=self.events,
        )
        self._sequence = 0

    async def show(self, offers: dict[int, list[SnapshotRef]], *, round: int = 8) -> None:
        """Publish the trainers' records."""
        self._sequence += 1
        for number, refs in offers.items():
            node = self.nodes[number]
            directory = Directory(dht=node.transport.dht, identity=node.identity, run=self.run)
            now_s = node.transport.network.now_s()
            fields = {
                "run": self.run,
                "round": round,
                "snapshots": refs,
                "sequence": self._sequence,
                "sent_at_s": now_s,
            }
            assert await directory.publish(record(node.identity, **fields))

    def named(self, event: str) -> list[dict[str, object]]:
        """The fields of all events of that name."""
        return [fields for name, fields in self.heard if name == event]


def weights_like(trainer: Trainer, factor: float) -> bytes:
    """A whole snapshot; with a large factor a useless one."""
    return encode_weights({name: view * factor for name, view in trainer.flat.views(trainer.replica.phi).items()})


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


# ---- what to start from


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
