"""What several worlds of the pipeline benchmark come to."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.pipeline import merged


def world(*seconds: float, predicted_s: float) -> dict[str, Any]:
    counts = dict.fromkeys(("returned", "lost", "incomplete", "failed_hops"), 2)
    rest = dict.fromkeys(("MB_per_iteration", "processors_busy", "overruns", "load"), 0.5)
    planned = {"predicted_s": predicted_s, "transfer_factor": 1.0, "bound_s": 1.0}
    return {"seconds": list(seconds)} | planned | counts | rest


def test_worlds_count_alike() -> None:
    full = [
        world(4.0, 4.0, 4.0, predicted_s=4.0),
        world(8.0, 8.0, 8.0, predicted_s=8.0),
        world(9.0, 9.0, 9.0, predicted_s=9.0),
    ]
    ours = [
        world(2.9, 3.0, 3.1, predicted_s=2.5),
        world(4.0, 4.0, 4.0, predicted_s=4.0),
        world(7.2, 7.2, 9.9, predicted_s=8.0),
    ]
    found = merged(ours, full)
    assert found["iteration_s"] == 4.0
    assert found["worlds_s"] == [3.0, 4.0, 7.2]
    assert found["less_per_world"] == pytest.approx([0.25, 0.5, 0.2])
    assert found["less_than_full"] == pytest.approx(0.25)
    assert found["errors"] == pytest.approx([0.2, 0.0, -0.1])
    assert found["error"] == pytest.approx(0.1), "the median size; signs do not cancel"
    assert found["returned"] == 6
    assert found["iterations"] == 9
    low, high = found["quartiles_s"]
    assert low <= 4.0 <= high
