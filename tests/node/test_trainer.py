"""The training state: restoring it goes on bit for bit, and looking at other weights leaves it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.batches import RoundBatches
from model.data import ShardIndex, decode_tokens
from node.bench import choose_sequences, choose_threads
from node.trainer import Trainer
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.ids import BlobId
from protocol.manifest import InitialStateSpec, Manifest
from tests.node.runs import tiny_run


def trainer_of(manifest: Manifest, store: BlobStore) -> Trainer:
    return Trainer(
        manifest, heldout=decode_tokens(store.read(BlobId(manifest.data.heldout)), manifest.model.vocab_size)
    )


def batches_of(manifest: Manifest, store: BlobStore) -> RoundBatches:
    assert manifest.data.index is not None
    shard, _ = ShardIndex.unpack(store.read(BlobId(manifest.data.index))).entries[0]
    tokens = decode_tokens(store.read(BlobId(shard)), manifest.model.vocab_size)
    return RoundBatches(tokens, seed=1, sequence_tokens=manifest.inner.sequence_tokens)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_restoring_goes_on_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    # Matrices of at least 4096 entries, so that bitsandbytes really keeps their states in 8 bits.
    shape: dict[str, Any] = {"model__hidden_size": 64, "model__intermediate_size": 128}
    signed, store = tiny_run(tmp_path, inner__optimizer=optimizer, **shape)
    first, batches = trainer_of(signed.manifest, store), batches_of(signed.manifest, store)
    for _ in range(signed.manifest.sync.inner_steps):
        first.step(batches, 4)
    first.end_round(1)
    first.apply([])
    first.step(batches, 4)
    tensors, meta = first.checkpoint(batches)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}

    second = trainer_of(signed.manifest, store)
    second.restore(saved, meta)
    again = batches_of(signed.manifest, store)
    again.cursor = meta["cursor"]
    for _ in range(2):
        assert first.step(batches, 4).loss == second.step(again, 4).loss
    assert torch.equal(first.flat.theta, second.flat.theta)
    assert (second.round, second.step_in_round, second.tokens) == (first.round, first.step_in_round, first.tokens)


def test_other_weights_are_measured_without_touching_ours(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path)
    trainer, batches = trainer_of(signed.manifest, store), batches_of(signed.manifest, store)
    fresh = trainer.read_snapshot(trainer.snapshot())
    untrained = trainer.evaluate()
    for _ in range(10):
        trainer.step(batches, 8)
    before = trainer.flat.theta.clone()
    assert trainer.evaluate(fresh) == untrained
    assert trainer.evaluate() < untrained
    assert torch.equal(trainer.flat.theta, before)
    assert trainer.flat.is_intact()


def test_who_adopts_a_state_in_the_middle_of_a_round_claims_nothing_of_it(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path)
    donor, astray = trainer_of(signed.manifest, store), trainer_of(signed.manifest, store)
    batches = batches_of(signed.manifest, store)
    for _ in range(3):
        astray.step(batches, 2)
    assert astray.optimizer.state
    astray.adopt(astray.read_snapshot(donor.snapshot()), 7)
    assert astray.tokens_in_round == 0
    assert not astray.optimizer.state


def test_adopting_a_snapshot_starts_from_it(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path)
    donor, batches = trainer_of(signed.manifest, store), batches_of(signed.manifest, store)
    for _ in range(signed.manifest.sync.inner_steps):
        donor.step(batches, 4)
    donor.end_round(1)
    donor.apply([])
    joiner = trainer_of(signed.manifest, store)
    joiner.adopt(joiner.read_snapshot(donor.snapshot()), 7)
    assert torch.equal(joiner.flat.theta, donor.replica.phi)
    assert joiner.round == 7
    assert not joiner.replica.momentum.any()


def test_a_wrong_initial_hash_is_refused(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path)
    wrong = signed.manifest.model_copy(update={"initial_state": InitialStateSpec(seed=1, sha256="0" * 64)})
    with pytest.raises(UserError, match="initial_state"):
        trainer_of(wrong, store)


def test_measuring_leaves_the_weights_and_stays_in_range(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path)
    trainer = trainer_of(signed.manifest, store)
    before = trainer.flat.theta.clone()
    assert choose_threads(trainer) >= 1
    sequences = choose_sequences(trainer, budget_s=0.05)
    assert signed.manifest.inner.min_sequences <= sequences <= signed.manifest.inner.max_sequences
    assert torch.equal(trainer.flat.theta, before)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in trainer.model.parameters())


def test_a_round_that_diverges_is_given_up(tmp_path: Path) -> None:
    signed, store = tiny_run(tmp_path)
    trainer, batches = trainer_of(signed.manifest, store), batches_of(signed.manifest, store)
    start = trainer.flat.theta.clone()
    trainer.step(batches, 4)
    trainer.flat.theta[3] = float("nan")
    trainer.end_round(1)
    trainer.apply([])
    assert trainer.num_divergences == 1
    assert torch.equal(trainer.flat.theta, start)
    assert trainer.step(batches, 4).loss > 0
    assert trainer.flat.theta.isfinite().all()
