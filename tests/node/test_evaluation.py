"""Measuring the held-out loss costs a training peer one percent of its time, however slow it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from model.data import decode_tokens
from node.compute import VirtualCompute
from node.evaluation import Evaluation
from node.trainer import Trainer
from protocol.ids import BlobId
from protocol.virtual_time import run_virtual
from tests.node.runs import tiny_run

ROUND_S = 60.0


class PieceCompute(VirtualCompute):
    """Time passes for every piece of the held-out set that is measured."""

    def __init__(self, trainer: Trainer, *, piece_s: float) -> None:
        super().__init__(seconds_per_call=0.0)
        self._piece_s, self.pieces, self.total = piece_s, 0, trainer.heldout.num_pieces
        self.calls: list[int] = []

    async def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        pieces = min(args[0], self.total) if args else self.total
        self.calls.append(pieces)
        await asyncio.sleep(pieces * self._piece_s)
        return function(*args, **kwargs)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    signed, store = tiny_run(tmp_path, sync__round_target_s=ROUND_S, sync__snapshot_rounds=3)
    heldout = decode_tokens(store.read(BlobId(signed.manifest.data.heldout)), signed.manifest.model.vocab_size)
    trainer = Trainer(signed.manifest, heldout=heldout)
    assert trainer.heldout.num_pieces >= 8
    return trainer


def measure(trainer: Trainer, compute: PieceCompute, *, rounds: int, last: bool = False) -> tuple[list[float], float]:
    """Losses of so many rounds, and the share of the time that measuring them took."""

    async def story() -> tuple[list[float], float]:
        evaluation, losses, spent_s = Evaluation(trainer, compute), [], 0.0
        clock = asyncio.get_running_loop()
        for number in range(rounds):
            await asyncio.sleep(ROUND_S)
            started_s = clock.time()
            losses.append(await evaluation.after_round(last=last and number == rounds - 1))
            spent_s += clock.time() - started_s
        return losses, spent_s / clock.time()

    return run_virtual(story())


def test_a_slow_machine_spends_half_a_percent(trainer: Trainer) -> None:
    whole = trainer.evaluate()
    compute = PieceCompute(trainer, piece_s=0.085)
    losses, share = measure(trainer, compute, rounds=40)
    assert 0.0025 < share < 0.005
    assert losses == pytest.approx([whole] * 40), "the weights stay as they are"
    assert 1 <= compute.calls.count(compute.total) < 10


def test_a_fast_machine_measures_everything(trainer: Trainer) -> None:
    trainer.evaluate()
    compute = PieceCompute(trainer, piece_s=1e-4)
    measure(trainer, compute, rounds=5)
    assert compute.calls[1:] == [compute.total] * 4, "the first shows what it costs"


def test_the_last_round_of_a_run_is_measured_whole(trainer: Trainer) -> None:
    trainer.evaluate()
    compute = PieceCompute(trainer, piece_s=5.0)
    measure(trainer, compute, rounds=3, last=True)
    assert compute.calls == [1, 1, compute.total]


def test_without_anything_to_compare_with_the_whole_is_measured(trainer: Trainer) -> None:
    compute = PieceCompute(trainer, piece_s=5.0)
    measure(trainer, compute, rounds=2)
    assert compute.calls == [compute.total, 1]


def test_foreign_weights_get_what_the_interval_between_snapshots_affords(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = trainer.read_snapshot(trainer.snapshot())
    whole = trainer.evaluate()
    looked, loss_of = list[int](), trainer.model.loss

    def counted(batch: Tensor) -> Tensor:
        looked.append(len(batch))
        return loss_of(batch)

    monkeypatch.setattr(trainer.model, "loss", counted)
    assert trainer.evaluate(foreign) == pytest.approx(whole)
    assert len(looked) == trainer.heldout.num_pieces
    measure(trainer, PieceCompute(trainer, piece_s=0.3), rounds=2)
    looked.clear()
    assert trainer.evaluate(foreign) == pytest.approx(whole)
    assert len(looked) == 3, "one piece per round"
