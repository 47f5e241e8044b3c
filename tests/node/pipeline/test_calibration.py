"""What iterations took tells how slow transfers are, and the next plan is made for that."""

from __future__ import annotations

import pytest

from node.pipeline.calibration import MOST, Ran, calibrated, transfer_factor
from node.pipeline.construct import construct
from node.pipeline.planning import search
from node.pipeline.variants import expected_s
from tests.node.pipeline.cases import drawn_case


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.15, 1.3, 1.6])
@pytest.mark.parametrize("seed", range(4))
def test_iterations_tell_how_slow_transfers_are(seed: int, factor: float) -> None:
    case = drawn_case(seed, spread=0.25, uplink_s=[0.4], downlink_s=[0.3])
    plans = [construct(case, seed=number) for number in range(3)]
    ran = [Ran(case, plan, expected_s(calibrated(case, factor), plan)) for plan in plans]
    found = transfer_factor(ran)
    predicted = sum(expected_s(calibrated(case, found), plan) for plan in plans)
    assert predicted == pytest.approx(sum(each.seconds for each in ran), rel=0.02)


def test_nothing_has_run_and_nothing_is_believed_without_end() -> None:
    case = drawn_case(1)
    plan = construct(case)
    assert transfer_factor([]) == 1.0
    assert transfer_factor([Ran(case, plan, 1e6)]) == MOST


def test_the_next_plan_is_made_for_links_as_slow_as_the_last_one_found_them() -> None:
    case = drawn_case(4, spread=0.25)
    plan, promised_s = search(case, None, seed=1, max_evaluations=64)
    _, hoped_s = search(case, plan, seed=1, max_evaluations=64)
    again, learnt_s = search(case, plan, seed=1, max_evaluations=64, took_s=1.25 * promised_s)
    assert learnt_s > 1.1 * hoped_s
    factor = transfer_factor([Ran(case, plan, 1.25 * promised_s)])
    assert learnt_s == expected_s(calibrated(case, factor), again)
