"""Measuring the machine."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from node import bench
from node.bench import choose_sequences, choose_threads, seconds_per_step
from node.trainer import Trainer
from protocol.manifest import Manifest
from tests.protocol.samples import manifest


@dataclass
class Machine:
    """A machine on which a step takes `fixed_s` and `per_sequence_s` for each sequence, under its own clock."""

    manifest: Manifest
    per_sequence_s: float
    fixed_s: float = 0.0
    now_s: float = 0.0
    tried: list[int] = field(default_factory=list)

    def seconds_per_step(self, _trainer: object, num_sequences: int) -> float:
        seconds = self.fixed_s + self.per_sequence_s * num_sequences
        self.now_s += seconds
        self.tried.append(num_sequences)
        return seconds

    def perf_counter(self) -> float:
        return self.now_s

    def choose(self, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setattr(bench, "seconds_per_step", self.seconds_per_step)
        monkeypatch.setattr(bench, "time", self)
        return choose_sequences(self)  # type: ignore[arg-type]  # only its manifest is read


def limited(smallest: int, largest: int) -> Manifest:
    """One second per step is wanted."""
    inner = {"lr": 1e-3, "sequence_tokens": 64, "min_sequences": smallest, "max_sequences": largest}
    return manifest(inner=inner, sync={"round_target_s": 50.0, "inner_steps": 50})


@pytest.mark.parametrize(
    ("per_sequence_s", "smallest", "largest", "expected"),
    [(0.1, 1, 64, 10), (0.001, 1, 64, 64), (10.0, 1, 64, 1), (10.0, 4, 64, 4), (1 / 30, 8, 64, 30)],
    ids=["middle", "fast", "slow", "slow with a floor", "from the floor upwards"],
)
def test_a_round_takes_its_target_time(
    per_sequence_s: float, smallest: int, largest: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(limited(smallest, largest), per_sequence_s)
    assert machine.choose(monkeypatch) == expected


def test_measuring_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for per_sequence_s in (0.0001, 0.003, 0.05, 0.4):
        machine = Machine(limited(1, 65_536), per_sequence_s)
        machine.choose(monkeypatch)
        assert machine.now_s <= 1.5 * bench.BUDGET_S, per_sequence_s
        assert max(machine.tried) <= 65_536


def test_a_machine_too_slow_for_the_budget_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(limited(1, 64), per_sequence_s=60.0)
    assert machine.choose(monkeypatch) == 1
    assert machine.tried == [1]


def test_measuring_leaves_no_trace(trainer: Trainer) -> None:
    before = trainer.flat.theta.clone()
    assert seconds_per_step(trainer, 2) > 0.0
    assert torch.equal(trainer.flat.theta, before)
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
    inner = trainer.manifest.inner
    assert inner.min_sequences <= choose_sequences(trainer, budget_s=0.05) <= inner.max_sequences
    assert torch.equal(trainer.flat.theta, before)


def test_the_faster_number_of_threads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.get_num_threads()
    tiny = Machine(limited(1, 64), 0.1)
    try:
        for seconds, expected in (({4: 2.0, 1: 1.0}, 1), ({4: 1.0, 1: 2.0}, 4)):
            torch.set_num_threads(4)
            monkeypatch.setattr(bench, "seconds_per_step", lambda *_, s=seconds: s[torch.get_num_threads()])
            assert choose_threads(tiny) == expected  # type: ignore[arg-type]  # only its manifest is read
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(own)
