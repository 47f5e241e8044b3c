"""Who publishes, who keeps copies, and what nobody keeps."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from node.snapshots import NUM_KEEPERS, NUM_KEPT, order_for_epoch
from node.trainer import Trainer
from protocol.errors import UserError
from protocol.ids import BlobId, RunId
from protocol.records import SnapshotRef
from protocol.virtual_time import run_virtual
from tests.node.snapshot_scene import EVERY, ROUND, Scene
from tests.node.swarm import neighbourhood, trainers
from tests.protocol.samples import RUN, identity, record

LOTTERY = RunId(RUN)
PEERS = [identity(number).peer_id for number in range(12)]


# ---- the lot


def test_the_lot_is_the_same_for_all_and_fair() -> None:
    run = LOTTERY
    order = order_for_epoch(run, 1, PEERS)
    assert order == order_for_epoch(run, 1, reversed(PEERS))
    assert sorted(order) == sorted(PEERS)
    firsts = Counter(order_for_epoch(run, epoch, PEERS)[0] for epoch in range(1200))
    assert set(firsts) == set(PEERS)
    assert max(firsts.values()) < 2 * 100, "each about 100 times"


def test_one_who_leaves_changes_nothing_but_his_own_place() -> None:
    order = order_for_epoch(LOTTERY, 5, PEERS)
    gone = order[3]
    assert order_for_epoch(LOTTERY, 5, [p for p in PEERS if p != gone]) == [p for p in order if p != gone]


# ---- a keeper among others


def keepers_of(trainer: Trainer, epoch: int, numbers: range) -> set[int]:
    """The numbers of the peers that the lot makes keepers."""
    peers = {identity(number).peer_id: number for number in numbers}
    return {peers[peer] for peer in order_for_epoch(trainer.manifest.run_id, epoch, list(peers))[:NUM_KEEPERS]}


def test_only_the_first_by_lot_publishes(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 1) as nodes:
            scene = Scene(trainer, nodes)
            live = trainers({1: [], 2: []})
            published: list[int] = []
            for round in range(1, 81):
                trainer.replica.phi.mul_(1.001)  # else all are one blob
                await scene.keeper.after_round(round, live)
                if scene.names()[len(published) :]:
                    published.append(round)
            run, own = trainer.manifest.run_id, nodes[0].peer
            turns = [1, *range(EVERY, 81, EVERY)]  # the first round of each epoch
            mine = [r for r in turns if order_for_epoch(run, r // EVERY, [own, *live])[0] == own]
            assert published == mine
            assert 1 <= len(mine) < 20
            assert [ref.round for ref in scene.shown] == mine[-NUM_KEPT:]

    run_virtual(story())


def test_only_the_newest_are_kept(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 1) as nodes:
            scene = Scene(trainer, nodes)
            for round in (4, 8, 12, 16):
                trainer.replica.phi.mul_(1.001)
                await scene.keeper.after_round(round, {})
            assert [ref.round for ref in scene.keeper.held] == [12, 16]
            assert scene.shown == scene.keeper.held
            assert scene.blobs == {ref.root for ref in scene.keeper.held}
            assert len(scene.blobs) == NUM_KEPT

    run_virtual(story())


def test_who_goes_to_another_stage_keeps_none(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 1) as nodes:
            scene = Scene(trainer, nodes)
            await scene.keeper.after_round(4, {})
            assert scene.blobs
            scene.keeper.let_go()
            assert (scene.keeper.held, scene.shown, scene.blobs) == ([], [], set())

    run_virtual(story())


def test_keepers_are_chosen_by_lot(trainer: Trainer, tmp_path: Path) -> None:
    """Among eight peers, node 0 copies exactly those snapshots for which it is among the first by lot."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 8) as nodes:
            kept = []
            epochs = range(2, 12)
            for epoch in epochs:
                scene = Scene(trainer, nodes)
                publisher = next(iter(keepers_of(trainer, epoch, range(8)) - {0}))
                ref = scene.offer(publisher, round=EVERY * epoch, factor=1.0 + epoch / 1000)
                await scene.keep({n: [ref] if n == publisher else [] for n in range(1, 8)}, round=EVERY * epoch)
                if scene.keeper.held:
                    kept.append(epoch)
            assert kept == [epoch for epoch in epochs if 0 in keepers_of(trainer, epoch, range(8))]
            assert 0 < len(kept) < len(epochs)

    run_virtual(story())


def test_who_is_no_keeper_is_not_listened_to(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 8) as nodes:
            scene = Scene(trainer, nodes)
            epoch = next(e for e in range(2, 50) if 0 in keepers_of(trainer, e, range(8)))
            outsider = next(n for n in range(1, 8) if n not in keepers_of(trainer, epoch, range(8)))
            ref = scene.offer(outsider, round=EVERY * epoch)
            await scene.keep({n: [ref] if n == outsider else [] for n in range(1, 8)}, round=EVERY * epoch)
            assert scene.keeper.held == []
            assert scene.blobs == set()

    run_virtual(story())


@pytest.mark.parametrize(
    ("factor", "data"), [(30.0, None), (1.0, b"garbage"), (float("nan"), None)], ids=["bad loss", "garbage", "nan"]
)
def test_a_bad_snapshot_is_refused_and_removed(
    trainer: Trainer, tmp_path: Path, factor: float, data: bytes | None
) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 3) as nodes:
            scene = Scene(trainer, nodes)
            bad = scene.offer(1, round=ROUND, factor=factor, data=data)
            good = scene.offer(2, round=ROUND - EVERY)
            await scene.keep({1: [bad], 2: [good]})
            assert scene.names() == ["snapshot_refused", "snapshot_kept"], "and the next one is looked at"
            assert scene.shown == [good]
            assert scene.blobs == {good.root}
            scene.heard.clear()
            await scene.keep({1: [bad], 2: [good]})
            assert scene.heard == [], "it is not fetched a second time"

    run_virtual(story())


def test_it_is_compared_with_the_own_loss_of_its_round(trainer: Trainer, tmp_path: Path) -> None:
    """Early in training the loss falls faster than a copy spreads."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 2) as nodes:
            fresh = trainer.evaluate()
            scene = Scene(trainer, nodes, own_losses={ROUND: fresh, ROUND + EVERY: fresh - 3.0})
            ref = scene.offer(1, round=ROUND)
            await scene.keep({1: [ref]}, round=ROUND + EVERY)
            assert scene.shown == [ref]
            late = scene.offer(1, round=ROUND + EVERY, factor=1.001)
            await scene.keep({1: [late]}, round=ROUND + EVERY)
            assert scene.shown == [ref], "but not with that of another round"

    run_virtual(story())


def test_who_showed_a_bad_one_is_heard_again_with_the_next(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 2) as nodes:
            scene = Scene(trainer, nodes)
            bad = scene.offer(1, round=ROUND, factor=30.0)
            again, later = (scene.offer(1, round=ROUND + n, factor=31.0 + n) for n in (0, 1))
            await scene.keep({1: [bad]})
            await scene.keep({1: [again]})
            await scene.keep({1: [later]})
            assert scene.names() == ["snapshot_refused"], "one check per peer and round of snapshots"
            good = scene.offer(1, round=ROUND + EVERY)
            await scene.keep({1: [good]}, round=ROUND + EVERY)
            assert scene.shown == [good]

    run_virtual(story())


def test_a_round_that_nobody_can_have_reached_is_not_kept(trainer: Trainer, tmp_path: Path) -> None:
    """Otherwise a copy of an honest state under an absurd round would block all later ones, and send joiners astray."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 4) as nodes:
            scene = Scene(trainer, nodes)
            absurd = scene.offer(1, round=10**9)
            good = scene.offer(2, round=ROUND)
            await scene.keep({1: [absurd], 2: [good], 3: []})
            assert scene.shown == [good]

    run_virtual(story())


def test_one_that_cannot_be_had_does_not_block_the_others(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 3) as nodes:
            scene = Scene(trainer, nodes)
            absent = SnapshotRef(round=ROUND + EVERY, root="e" * 64, size_bytes=100)
            good = scene.offer(2, round=ROUND)
            await scene.keep({1: [absent], 2: [good]})
            assert scene.shown == [good]
            assert "snapshot_unavailable" in scene.names()

    run_virtual(story())


def test_copies_come_from_all_who_have_them(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 4) as nodes:
            scene = Scene(trainer, nodes)
            ref = scene.offer(2, 3, round=ROUND)  # 1 shows it, but has lost it
            await scene.keep({1: [ref], 2: [ref], 3: [ref]})
            assert scene.shown == [ref]
            assert scene.nodes[0].store.has(BlobId(ref.root))

    run_virtual(story())


def test_a_full_disk_does_not_stop_training(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 2) as nodes:
            scene = Scene(trainer, nodes)
            ref = scene.offer(1, round=ROUND)

            def refuse(*_args: object) -> None:
                raise UserError("cannot keep a blob: No space left on device; free space there")

            monkeypatch.setattr(nodes[0].store, "put", refuse)
            monkeypatch.setattr(nodes[0].store, "finish", refuse)
            monkeypatch.setattr(nodes[0].store, "remove", refuse)
            await scene.keeper.after_round(EVERY, {})
            await scene.keep({1: [ref]})
            assert scene.names() == ["snapshot_failed", "snapshot_unavailable"]
            assert scene.shown == []

    run_virtual(story())


def test_what_a_peer_started_from_it_holds(trainer: Trainer, tmp_path: Path) -> None:
    async def story() -> None:
        async with neighbourhood(tmp_path, 1) as nodes:
            scene = Scene(trainer, nodes)
            ref = scene.offer(0, round=ROUND)
            scene.keeper.adopt(ref)
            scene.keeper.adopt(ref)
            assert scene.shown == [ref]

    run_virtual(story())


def test_a_wanted_snapshot_comes_before_its_time_but_not_in_every_round(trainer: Trainer, tmp_path: Path) -> None:
    """However many want one, for however long; and it is drawn anew in each round who publishes."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 1) as nodes:
            for every, apart in ((EVERY, 3), (40, 10)):
                scene = Scene(trainer, nodes)
                scene.keeper._every = every
                for round in range(81):
                    trainer.replica.phi.mul_(1.001)
                    await scene.keeper.after_round(round, {}, is_wanted=True)
                rounds = [int(fields["round"]) for name, fields in scene.heard if name == "snapshot_published"]
                assert len(rounds) <= 81 // apart + 81 // every + 1
                assert max(later - earlier for earlier, later in pairwise(rounds)) <= apart

    run_virtual(story())


def test_snapshots_of_the_future_do_not_hold_up_a_wanted_one(trainer: Trainer, tmp_path: Path) -> None:
    lie = SnapshotRef(round=10**9, root="0" * 64, size_bytes=1)
    liars = {identity(n).peer_id: record(identity(n), snapshots=[lie], wants_state=True) for n in (1, 2)}

    async def story() -> None:
        async with neighbourhood(tmp_path, 1) as nodes:
            scene = Scene(trainer, nodes)
            scene.keeper._every = 40
            for round in range(15):
                await scene.keeper.after_round(round, liars, is_wanted=True)
            assert [fields["round"] for name, fields in scene.heard if name == "snapshot_published"] == [0, 10]

    run_virtual(story())


def test_who_wants_a_state_takes_no_part_in_the_lot(trainer: Trainer, tmp_path: Path) -> None:
    """Else nobody would publish in its turn, or it would publish its old state."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 1) as nodes:
            scene = Scene(trainer, nodes)
            wishing = {p: r.model_copy(update={"wants_state": True}) for p, r in trainers({1: [], 2: []}).items()}
            rounds = range(0, 80, EVERY)
            for round in rounds:
                trainer.replica.phi.mul_(1.001)
                await scene.keeper.after_round(round, wishing)
            assert scene.names() == ["snapshot_published"] * len(rounds)

    run_virtual(story())
