"""Plans are judged by what they take on several days, where days differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from node.pipeline.construct import construct
from node.pipeline.improve import Annealing, improve
from node.pipeline.replay import replay
from node.pipeline.solver import replan
from node.pipeline.variants import NUM_VARIANTS, expected_s, variants
from tests.node.pipeline.cases import drawn_case


def test_without_a_spread_there_is_one_variant() -> None:
    case = drawn_case(2)
    plan = construct(case)
    assert variants(case) == (case,)
    assert expected_s(case, plan) == replay(case, plan)[0]


def test_variants_differ_by_the_spread_and_are_always_the_same() -> None:
    case = drawn_case(2, spread=0.2)
    drawn = variants(case)
    assert len(drawn) == NUM_VARIANTS
    assert drawn == variants(drawn_case(2, spread=0.2))
    away = ~np.eye(case.num_nodes, dtype=bool)
    factors = np.log([np.array(each.link_s)[away] / np.array(case.link_s)[away] for each in drawn])
    assert factors.std() == pytest.approx(0.2, rel=0.15)
    assert factors[0] == pytest.approx(-factors[1])
    speeds = np.log([np.array(each.forward_s) / np.array(case.forward_s) for each in drawn])
    assert speeds.std() == pytest.approx(0.1, rel=0.4)


def test_of_several_plans_the_one_with_the_best_mean_is_taken() -> None:
    case = drawn_case(4, spread=0.2)
    plan = replan(case, None, dispatch="backward_first", seed=3, seconds=60.0, max_evaluations=64)
    firsts = [replace(construct(case, seed=seed), dispatch="backward_first") for seed in (3, 4)]
    annealing = Annealing(seconds=30.0, seed=3, max_evaluations=32)
    alone = [improve(case, first, annealing)[0] for first in firsts]
    assert expected_s(case, plan) == min(expected_s(case, each) for each in alone)
