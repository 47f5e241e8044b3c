"""Where lines are shared, the lower bound counts them, and no plan is below it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.pipeline.bounds import lower_bound
from node.pipeline.construct import construct
from node.pipeline.improve import Annealing, improve
from node.pipeline.replay import replay
from tests.node.pipeline.cases import drawn_case


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_beats_the_bound(seed: int) -> None:
    case = drawn_case(seed)
    nodes = range(case.num_nodes)
    shared = case.model_copy(
        update={
            "uplink_s": tuple(0.5 + 0.4 * (node % 3) for node in nodes),
            "downlink_s": tuple(0.2 + 0.3 * (node % 2) for node in nodes),
            "closing_s": 0.5,
            "partition": construct(case, seed=seed).partition,
        }
    )
    first = replace(construct(shared, seed=seed), dispatch="backward_first")
    plan, _ = improve(shared, first, Annealing(seconds=60.0, max_evaluations=300))
    assert lower_bound(shared, plan, seconds=5.0) <= replay(shared, plan)[0]


def test_slow_lines_decide() -> None:
    """Every visit sends two payloads."""
    case = drawn_case(1)
    slow = case.model_copy(update={"uplink_s": (50.0,) * case.num_nodes, "downlink_s": (0.0,) * case.num_nodes})
    plan = construct(slow)
    origin = plan.partition[0][0]
    assert lower_bound(slow, plan, seconds=5.0) >= 2 * 50.0 * slow.starts(origin)
    assert lower_bound(case, plan, seconds=5.0) < 2 * 50.0
