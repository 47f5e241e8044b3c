"""What iterations took tells how slow transfers are, and the next plan is made for that."""

from __future__ import annotations

import math

import pytest

from node.pipeline.calibration import MOST, Ran, calibrated, transfer_factor
from node.pipeline.case import Case
from node.pipeline.construct import construct
from node.pipeline.plan import Microbatch, Plan
from node.pipeline.planning import search
from node.pipeline.variants import expected_s
from tests.node.pipeline.cases import drawn_case, drawn_document


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


def test_a_plan_that_never_ends_by_our_links_tells_nothing() -> None:
    """In practice it did end: whoever waits for a slot too long is gone around."""
    drawn = drawn_document(0)
    document = drawn | {
        "num_nodes": 4,
        "stage_sizes": [2, 1, 1],
        "path_length": 3,
        "slots_per_node": 1,
        "rounds": 1,
        "forward_s": [1.0] * 4,
        "link_s": [[0.0] * 4] * 4,
        "spread": 0.25,
    }
    crossed = tuple(Microbatch(path=path) for path in ((0, 2, 3), (1, 3, 2)))
    plan = Plan(partition=((0, 1), (2,), (3,)), microbatches=crossed)
    case = Case.model_validate(document)
    assert expected_s(case, plan) == math.inf
    assert transfer_factor([Ran(case, plan, 10.0)]) == 1.0


@pytest.mark.parametrize("share", [0.8, 1.25])
def test_where_transfers_take_no_time_they_are_not_to_blame(share: float) -> None:
    case = drawn_case(2, link_s=[[0.0] * 6] * 6)
    plan = construct(case)
    assert transfer_factor([Ran(case, plan, share * expected_s(case, plan))]) == 1.0
