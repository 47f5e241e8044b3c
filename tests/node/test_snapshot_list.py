"""What snapshots leave on the disk, and who clears it away."""

from __future__ import annotations

from pathlib import Path

from node.snapshot_list import SnapshotList
from node.trainer import Trainer
from protocol.ids import BlobId
from protocol.virtual_time import run_virtual
from tests.node.snapshot_scene import EVERY, ROUND, Scene
from tests.node.swarm import neighbourhood


def test_the_next_session_removes_what_the_last_one_left(trainer: Trainer, tmp_path: Path) -> None:
    """Whole ones and parts, and nothing else: the store has the data, too, and the blobs of other runs."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 2) as nodes:
            scene = Scene(trainer, nodes, folder=tmp_path)
            await scene.keeper.after_round(EVERY, {})
            other = nodes[0].store.put(b"a shard")
            part = nodes[0].store.partial_path(BlobId("0" * 64))
            part.write_bytes(b"part")
            SnapshotList(nodes[0].store, tmp_path).add("0" * 64)
            left = scene.blobs - {other}
            assert left
            again = Scene(trainer, nodes, folder=tmp_path)
            held = again.offer(0, round=ROUND)
            again.keeper.adopt(held)
            assert left < again.blobs
            again.keeper.clear()
            assert again.blobs == {other, held.root}
            assert not part.exists()
            Scene(trainer, nodes, folder=tmp_path).keeper.clear()
            assert again.blobs == {other}
            (tmp_path / "snapshots.json").write_text('[7, "garbage"')
            Scene(trainer, nodes, folder=tmp_path).keeper.clear()

    run_virtual(story())


def test_what_came_of_a_snapshot_that_nobody_offers_any_more_goes(trainer: Trainer, tmp_path: Path) -> None:
    """Or whoever offers a new one again and again, and never gives all of it, fills the disk."""

    async def story() -> None:
        async with neighbourhood(tmp_path, 2) as nodes:
            scene = Scene(trainer, nodes)
            stalled = scene.offer(1, round=ROUND)
            nodes[1].store.remove(BlobId(stalled.root))
            part = nodes[0].store.partial_path(BlobId(stalled.root))
            part.write_bytes(b"part")
            await scene.keep({1: [stalled]})
            assert scene.names() == ["snapshot_unavailable"]
            assert part.exists(), "it may be gone on with"
            await scene.keep({1: []})
            assert not part.exists()

    run_virtual(story())
