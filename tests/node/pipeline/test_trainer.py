"""The trainer of one stage."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from node.pipeline.trainer import StageTrainer
from tests.node.runs import tiny_run


@pytest.mark.parametrize(
    ("passes_s", "expected_s"),
    [
        ([0.03, 0.02, 0.04, 0.001, 0.02] * 10, 0.001),  # interrupted more often than not
        ([3.0, 2.0, 1.0], 2.0),  # too slow to be tried often
    ],
)
def test_the_speed_is_that_of_the_fastest_of_a_few_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes_s: list[float], expected_s: float
) -> None:
    signed, _ = tiny_run(tmp_path, model__num_layers=2, pipeline__stages=2)
    trainer = StageTrainer(signed.manifest, stage=1)
    begins = itertools.accumulate(passes_s, initial=0.0)
    clock = itertools.chain.from_iterable(itertools.pairwise(begins))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert trainer.measure_forward() == pytest.approx(expected_s)
