"""The whole model from its stages' snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model.initial import initialise
from model.transformer import Transformer
from model.weights import encode_weights
from node.artifacts import load_stages
from node.events import EventLog
from node.pipeline.archive import StageArchive, assemble, kept_copies
from node.pipeline.trainer import StageTrainer
from node.training_state import model_config
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.ids import BlobId
from protocol.manifest import Manifest
from protocol.memory import MemoryNetwork, MemoryTransport
from protocol.records import PeerRecord, SnapshotRef
from tests.node.pipeline.records import FixedView, peer_id, record
from tests.node.runs import tiny_run


@pytest.fixture
def run(tmp_path: Path) -> tuple[Manifest, BlobStore]:
    signed, store = tiny_run(tmp_path, model__num_layers=4, pipeline__stages=3)
    return signed.manifest, store


def publish(manifest: Manifest, store: BlobStore, stage: int, *, round: int, data: bytes | None = None) -> PeerRecord:
    """A stage peer whose record names a snapshot, which is in the store already."""
    data = StageTrainer(manifest, stage=stage).snapshot() if data is None else data
    ref = SnapshotRef(round=round, root=store.put(data), size_bytes=len(data))
    return record(stage + 1, stage, run=manifest.run_id, round=round + 1, snapshots=[ref])


def archive(
    manifest: Manifest, store: BlobStore, folder: Path, *records: PeerRecord
) -> list[tuple[str, dict[str, Any]]]:
    """One look of an archive; returns what it tells."""
    told: list[tuple[str, dict[str, Any]]] = []
    events = EventLog()
    events.listen(lambda event, fields: told.append((event, fields)))
    keeper = StageArchive(
        manifest,
        directory=FixedView(*records),
        transport=MemoryTransport(MemoryNetwork(), peer_id(9)),
        store=store,
        folder=folder,
        events=events,
    )
    asyncio.run(keeper.look())
    return told


def test_the_stages_make_the_model(run: tuple[Manifest, BlobStore], tmp_path: Path) -> None:
    manifest, store = run
    archive(manifest, store, tmp_path, *(publish(manifest, store, stage, round=4 + stage) for stage in range(3)))
    weights, round = assemble(manifest, tmp_path, store)
    assert round == 4
    whole = Transformer(model_config(manifest))
    initialise(whole, manifest.initial_state.seed)
    assert {name: p.tolist() for name, p in whole.named_parameters()} == {
        name: w.tolist() for name, w in weights.items()
    }


def test_newer_states_replace_older_ones_and_a_restart_remembers(
    run: tuple[Manifest, BlobStore], tmp_path: Path
) -> None:
    manifest, store = run
    first = publish(manifest, store, 1, round=3)
    assert [event for event, _ in archive(manifest, store, tmp_path, first)] == ["stage_archived"]
    assert archive(manifest, store, tmp_path, first) == []
    trainer = StageTrainer(manifest, stage=1)
    with torch.no_grad():
        trainer.replica.phi.add_(1.0)
    newer = publish(manifest, store, 1, round=8, data=trainer.snapshot())
    assert [event for event, _ in archive(manifest, store, tmp_path, newer)] == ["stage_archived"]
    assert not store.has(first.snapshots[0].root)  # type: ignore[arg-type]


def test_a_round_that_the_swarm_has_not_reached_is_a_lie_and_does_not_last(
    run: tuple[Manifest, BlobStore], tmp_path: Path
) -> None:
    manifest, store = run
    others = [publish(manifest, store, stage, round=4) for stage in (0, 1)]
    liar = publish(manifest, store, 2, round=10**9 - 1)
    told = archive(manifest, store, tmp_path, *others, liar)
    assert sorted(fields["stage"] for name, fields in told if name == "stage_archived") == [0, 1]
    # One that was taken in while nobody else was there is given up again.
    archive(manifest, store, tmp_path, liar)
    told = archive(manifest, store, tmp_path, *others, publish(manifest, store, 2, round=4))
    assert ("stage_archived", 2, 4) in [(name, fields.get("stage"), fields.get("round")) for name, fields in told]


def test_copies_for_another_stage_are_given_up_unless_they_are_in_use(
    run: tuple[Manifest, BlobStore], tmp_path: Path
) -> None:
    """A peer of stage 0 kept one of stage 1; now it holds that stage itself, and keeps one of stage 2."""
    manifest, store = run
    records = [publish(manifest, store, stage, round=4) for stage in range(3)]
    refs = [each.snapshots[0] for each in records]
    asyncio.run(copies(manifest, store, tmp_path, records, stages=[0, 1, 2]).look())
    copies(manifest, store, tmp_path, records, stages=[2]).drop_others(in_use={refs[1].root})
    assert kept_copies(tmp_path) == {2: refs[2]}
    assert [store.has(BlobId(ref.root)) for ref in refs] == [False, True, True]


def test_a_peer_in_a_bootstrap_node_s_home_leaves_the_collected_model_alone(
    run: tuple[Manifest, BlobStore], tmp_path: Path
) -> None:
    manifest, store = run
    records = [publish(manifest, store, stage, round=4) for stage in range(3)]
    archive(manifest, store, tmp_path, *records)
    for stages in ([1], [2]):  # it joins, and moves
        peer = copies(manifest, store, tmp_path, records, stages=stages)
        peer.drop_others(in_use=set())
        asyncio.run(peer.look())
    assert kept_copies(tmp_path) == {2: records[2].snapshots[0]}
    _, oldest = assemble(manifest, tmp_path, store)
    assert oldest == 4


def copies(
    manifest: Manifest, store: BlobStore, folder: Path, records: Sequence[PeerRecord], *, stages: Sequence[int]
) -> StageArchive:
    """What a stage peer keeps of other stages."""
    return StageArchive(
        manifest,
        stages=stages,
        directory=FixedView(*records),
        transport=MemoryTransport(MemoryNetwork(), peer_id(9)),
        store=store,
        folder=folder,
        events=EventLog(),
    )


def test_a_state_of_another_shape_is_refused(run: tuple[Manifest, BlobStore], tmp_path: Path) -> None:
    manifest, store = run
    other = publish(manifest, store, 1, round=3, data=encode_weights({"x": torch.zeros(3)}))
    assert [event for event, _ in archive(manifest, store, tmp_path, other)] == ["state_refused"]


def test_missing_stages_are_named(run: tuple[Manifest, BlobStore], tmp_path: Path) -> None:
    manifest, store = run
    archive(manifest, store, tmp_path, publish(manifest, store, 1, round=3))
    with pytest.raises(UserError, match="stage 0, 2 of tiny is not in this home"):
        assemble(manifest, tmp_path, store)


def test_stages_may_be_left_out_when_sampling(run: tuple[Manifest, BlobStore], tmp_path: Path) -> None:
    manifest, store = run
    archive(manifest, store, tmp_path, *(publish(manifest, store, stage, round=1) for stage in range(3)))
    trained = load_stages(manifest, tmp_path, store)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    whole = trained.model(tokens)
    trained.omit_stages([2])
    skipped = trained.model(tokens)
    parts = [StageTrainer(manifest, stage=stage).worker.stage for stage in range(2)]
    hidden = parts[1](parts[0](parts[0].embed(tokens)))
    expected = trained.model.model.norm(hidden) @ trained.model.head_weight.t()
    torch.testing.assert_close(skipped, expected)
    assert not torch.allclose(whole, skipped, atol=1e-4)
    assert list(trained.sample("def", max_tokens=8, temperature=0.0, top_p=1.0, seed=0))
    for wrong in (0, 3, -1):
        with pytest.raises(UserError, match=f"cannot skip stage {wrong} of tiny; choose from 1 to 2"):
            trained.omit_stages([wrong])
