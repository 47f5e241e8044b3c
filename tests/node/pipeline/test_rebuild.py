"""Whose copy a lost stage goes on from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from node.compute import VirtualCompute
from node.events import EventLog
from node.pipeline.archive import STATE_PROTOCOL, StateReply, StateRequest
from node.pipeline.rebuild import StageRebuilder
from node.pipeline.trainer import StageTrainer
from protocol.blob_exchange import serve_blobs
from protocol.blobs import BlobStore
from protocol.directory import Directory
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.memory import MemoryNetwork, MemoryTransport
from protocol.records import PeerRecord, SnapshotRef
from protocol.transport import Stream
from protocol.virtual_time import run_virtual
from protocol.wire import read_message, write_message
from tests.node.pipeline.records import FixedView, peer_id, record
from tests.node.runs import tiny_run

LOST, SWARM_ROUND = 1, 30


class View(FixedView):
    """Also shows who is gone."""

    def __init__(self, *records: PeerRecord, departed: list[PeerRecord]) -> None:
        super().__init__(*records)
        self.departed: Mapping[PeerId, PeerRecord] = {PeerId(each.peer): each for each in departed}


class Scene:
    """Peers of stages 0 and 2, numbered from 1, some of which keep a copy of stage 1; and the trainer of one that moves there."""

    def __init__(self, folder: Path) -> None:
        signed, _ = tiny_run(folder, model__num_layers=4, pipeline__stages=3)
        self.manifest: Manifest = signed.manifest
        self.trainer = StageTrainer(self.manifest, stage=LOST)
        self.own_store = BlobStore(folder / "own")
        self._others = BlobStore(folder / "others")
        self.kept: dict[int, SnapshotRef] = {}
        self.departed: list[PeerRecord] = []

    def copy(self, value: float, *, round: int, store: BlobStore | None = None) -> SnapshotRef:
        """A snapshot of stage 1 whose weights are all `value`."""
        donor = StageTrainer(self.manifest, stage=LOST)
        with torch.no_grad():
            donor.replica.phi.fill_(value)
        data = donor.snapshot()
        root = (store or self._others).put(data)
        return SnapshotRef(round=round, root=root, size_bytes=len(data))

    def gone(self, number: int, *refs: SnapshotRef, stage: int = LOST, **fields: str) -> None:
        """A replica of stage 1, or whoever else, that vouched for these, and is gone."""
        last = record(number, stage, run=self.manifest.run_id, round=SWARM_ROUND, snapshots=list(refs))
        self.departed.append(last.model_copy(update=fields))

    def rebuilt_from(self, *, own: SnapshotRef | None = None, newer_than: int | None = None) -> float | None:
        """The value of the weights that the mover ends up with; None if they are those it had."""
        before = self.trainer.replica.phi.clone()
        run_virtual(self._rebuild(own, newer_than))
        after = self.trainer.replica.phi
        return None if torch.equal(before, after) else float(after[0])

    async def _rebuild(self, own: SnapshotRef | None, newer_than: int | None) -> None:
        network = MemoryNetwork()
        async with AsyncExitStack() as stack:
            for number in range(1, 5):
                transport = await stack.enter_async_context(MemoryTransport(network, peer_id(number)))
                serve_blobs(transport, self._others)
                transport.handle(STATE_PROTOCOL, self._serves(number))
            mover = await stack.enter_async_context(MemoryTransport(network, peer_id(9)))
            records = [
                record(number, 0 if number < 3 else 2, run=self.manifest.run_id, round=SWARM_ROUND)
                for number in range(1, 5)
            ]
            await StageRebuilder(
                self.trainer,
                directory=cast(Directory, View(*records, departed=self.departed)),
                transport=mover,
                store=self.own_store,
                compute=VirtualCompute(seconds_per_call=0.0),
                events=EventLog(),
                own=own,
            ).rebuild(newer_than=newer_than)

    def _serves(self, number: int) -> Callable[[Stream], asyncio.Future[None]]:
        async def serve(stream: Stream) -> None:
            await read_message(stream, StateRequest)
            await write_message(stream, StateReply(kept=self.kept.get(number)))

        return serve  # type: ignore[return-value]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_two_who_agree_do_not_outvote_the_lost_replicas(scene: Scene) -> None:
    """What those last vouched for, one honest keeper has; two others tell of something newer."""
    honest, forged = scene.copy(1.0, round=28), scene.copy(2.0, round=30)
    scene.kept = {1: honest, 2: forged, 3: forged}
    scene.gone(5, honest)
    scene.gone(6, honest)
    assert scene.rebuilt_from() == 1.0


def test_one_that_was_of_the_stage_does_not_speak_for_all(scene: Scene) -> None:
    """By the rule for joiners: of three, two must have vouched."""
    honest, forged = scene.copy(1.0, round=28), scene.copy(2.0, round=30)
    scene.kept = {1: honest, 2: honest, 3: forged}
    for number, ref in ((5, forged), (6, honest), (7, honest)):
        scene.gone(number, ref)
    assert scene.rebuilt_from() == 1.0


@pytest.mark.parametrize(
    "others", [{"stage": 2}, {"role": "bootstrap"}, {"state": "joining"}, {"state": "serving"}], ids=str
)
def test_only_those_count_that_were_replicas_of_the_stage(scene: Scene, others: dict[str, Any]) -> None:
    """Three others that are gone would outvote the two."""
    honest, forged = scene.copy(1.0, round=28), scene.copy(2.0, round=30)
    scene.kept = {1: honest, 2: forged, 3: forged}
    for number in (5, 6):
        scene.gone(number, honest)
    for number in (7, 8, 10):
        scene.gone(number, forged, **others)
    assert scene.rebuilt_from() == 1.0


@pytest.mark.parametrize("state", ["training", "leaving"])
def test_who_said_goodbye_vouches_as_well_as_who_fell_silent(scene: Scene, state: str) -> None:
    honest, forged = scene.copy(1.0, round=28), scene.copy(2.0, round=30)
    scene.kept = {1: honest, 2: forged, 3: forged}
    for number in (5, 6, 7):
        scene.gone(number, honest, state=state)
    assert scene.rebuilt_from() == 1.0


def test_who_knows_nothing_of_the_lost_takes_what_several_keep(scene: Scene) -> None:
    several, one, future = (scene.copy(value, round=round) for value, round in ((1.0, 6), (2.0, 8), (3.0, 99)))
    scene.kept = {1: several, 2: several, 3: one, 4: future}
    assert scene.rebuilt_from() == 1.0


def test_ones_own_copy_is_one_too(scene: Scene) -> None:
    """Who moves to the next stage may be the only one that has it."""
    own = scene.copy(1.0, round=7, store=scene.own_store)
    assert scene.rebuilt_from(own=own) == 1.0


@pytest.mark.parametrize(("round", "expected"), [(28, 1.0), (7, 2.0)])
def test_ones_own_copy_comes_before_what_strangers_tell_unless_it_is_old(
    scene: Scene, round: int, expected: float
) -> None:
    told = scene.copy(2.0, round=29)
    scene.kept = {1: told, 2: told}
    own = scene.copy(1.0, round=round, store=scene.own_store)
    assert scene.rebuilt_from(own=own) == expected


def test_without_any_copy_nothing_is_taken_from_nowhere(scene: Scene) -> None:
    assert scene.rebuilt_from() is None


@pytest.mark.parametrize(("checkpoint", "taken"), [(27, 1.0), (28, None), (29, None)])
def test_a_checkpoint_gives_way_to_a_later_copy_that_the_lost_replicas_vouched_for(
    scene: Scene, checkpoint: int, taken: float | None
) -> None:
    """Two strangers who tell of something newer still do not count."""
    vouched, forged = scene.copy(1.0, round=28), scene.copy(2.0, round=30)
    scene.kept = {1: vouched, 2: forged, 3: forged}
    scene.gone(5, vouched)
    scene.gone(6, vouched)
    assert scene.rebuilt_from(newer_than=checkpoint) == taken


def test_a_checkpoint_is_better_than_the_mean_of_the_neighbours(scene: Scene) -> None:
    assert scene.rebuilt_from(newer_than=3) is None


@pytest.mark.parametrize("state", ["training", "leaving"])
def test_one_stranger_s_goodbye_takes_no_checkpoint_from_the_only_replica(scene: Scene, state: str) -> None:
    """When it comes back nobody of its stage is there but whoever has just said so."""
    forged = scene.copy(2.0, round=30)
    scene.kept = {2: forged, 3: forged}
    scene.gone(7, forged, state=state)
    assert scene.rebuilt_from(newer_than=28) is None
    assert scene.rebuilt_from() == 2.0
