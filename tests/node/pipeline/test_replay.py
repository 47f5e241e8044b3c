"""What an iteration costs: hand-made cases, and the referee's own simulation on drawn ones."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any, get_args

import pytest

from node.pipeline.case import Case
from node.pipeline.construct import construct
from node.pipeline.plan import Dispatch, Microbatch, Plan
from node.pipeline.replay import replay, route, run
from tests.node.pipeline import referee
from tests.node.pipeline.cases import drawn_case, drawn_document

LINE = {
    "num_nodes": 2,
    "stage_sizes": [1, 1],
    "path_length": 2,
    "slots_per_node": 1,
    "rounds": 1,
    "forward_s": [1.0, 2.0],
    "backward_multiplier": 2.0,
    "loss_multiplier": 0.5,
    "link_s": [[0.0, 3.0], [5.0, 0.0]],
}
"""Forward 1 + 3 + 2, back to the loss 5, loss 0.5, to the last node 3, backward 4 + 5 + 2."""


def two_nodes(count: int, **fields: object) -> tuple[Case, Plan]:
    case = Case.model_validate(LINE | {"rounds": count} | fields)
    plan = Plan(partition=((0,), (1,)), microbatches=(Microbatch(path=(0, 1)),) * count)
    return case, plan


def test_one_microbatch_takes_the_sum_of_its_parts() -> None:
    case, plan = two_nodes(1)
    seconds, done = replay(case, plan)
    assert seconds == pytest.approx(1 + 3 + 2 + 5 + 0.5 + 3 + 4 + 5 + 2)
    assert route(case, (0, 1))[0][-1] == pytest.approx(seconds)
    assert [(task.node, task.start_s) for task in done] == [(0, 0), (1, 4), (0, 11), (1, 14.5), (0, 23.5)]


def test_with_one_slot_the_second_waits_for_the_firsts_last_backward() -> None:
    case, plan = two_nodes(2)
    assert replay(case, plan)[0] == pytest.approx(
        2 * 25.5
    )  # its slot is free when that begins, its processor when it ends


def starts(case: Case, plan: Plan) -> dict[tuple[int, int], float]:
    """When each microbatch's forward pass begins at each node."""
    return {(task.microbatch, task.node): task.start_s for task in reversed(replay(case, plan)[1])}


def test_transfers_share_the_line_that_they_both_need() -> None:
    case, plan = two_nodes(2, slots_per_node=2, rounds=1)
    alone_s = replay(case, plan)[0]
    shared = case.model_copy(update={"uplink_s": (2.5, 0.1), "downlink_s": (0.1, 0.1)})
    tasks = starts(shared, plan)
    # One leaves at 1, the other at 2, when 1.5 are left of the first. Sharing the line, that takes until 5, and the way 0.5 more.
    # The second has the line to itself then, is there at 6.5, and waits for node 1, which is busy until 7.5.
    assert tasks[0, 1] == pytest.approx(1 + 1 + 2 * 1.5 + 0.5)
    assert tasks[1, 1] == pytest.approx(5.5 + 2)
    wide = case.model_copy(update={"uplink_s": (0.0, 0.0), "downlink_s": (0.0, 0.0)})
    assert replay(wide, plan)[0] == alone_s


def test_a_transfer_leaves_to_others_what_it_can_not_use() -> None:
    """Both leave node 0 at once; the downlink of node 1 passes a quarter of its uplink, so node 2 gets three."""
    document = LINE | {
        "num_nodes": 4,
        "stage_sizes": [2, 2],
        "slots_per_node": 2,
        "rounds": 1,
        "forward_s": [1e-9, 5.0, 1.0, 1.0],
        "link_s": [[0.0, 5.0, 4.0, 4.0]] + [[4.0] * 4] * 3,
        "uplink_s": [1.0, 1.0, 1.0, 1.0],
        "downlink_s": [1.0, 1.0, 4.0, 1.0],
        "partition": [[0, 1], [2, 3]],
    }
    case = Case.model_validate(document)
    paths = ((0, 2), (0, 3), (1, 2), (1, 3))
    tasks = starts(case, Plan(partition=((0, 1), (2, 3)), microbatches=tuple(Microbatch(path=path) for path in paths)))
    assert tasks[0, 2] == pytest.approx(4.0)
    assert tasks[1, 3] == pytest.approx(4 / 3 + 3.0)


@pytest.mark.parametrize("dispatch", get_args(Dispatch))
@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_the_referee(seed: int, dispatch: Dispatch) -> None:
    case, document = drawn_case(seed), drawn_document(seed)
    plan = replace(construct(case, seed=seed), dispatch=dispatch)
    rng = random.Random(seed)
    shuffled = tuple(replace(each, priority=rng.randint(0, 5)) for each in plan.microbatches)
    plan = replace(plan, microbatches=shuffled)
    expected = referee.replay(document, plan.to_json())
    seconds, done = replay(case, plan)
    assert seconds == pytest.approx(math.inf if expected is None else expected, abs=1e-9)
    if expected is not None:
        assert len(done) == len(plan.microbatches) * (2 * case.path_length + 1)


def test_slots_that_wait_for_each_other_are_told() -> None:
    """Two paths through the same two nodes the other way round, one slot each: nobody ever moves."""
    document: dict[str, Any] = LINE | {
        "gap_s": 0.0,
        "gap_first_s": 0.0,
        "num_nodes": 4,
        "stage_sizes": [2, 1, 1],
        "path_length": 3,
        "forward_s": [1.0] * 4,
        "link_s": [[0.0] * 4] * 4,
    }
    paths = ((0, 2, 3), (1, 3, 2))
    plan = Plan(partition=((0, 1), (2,), (3,)), microbatches=tuple(Microbatch(path=path) for path in paths))
    assert referee.replay(document, plan.to_json()) is None
    assert replay(Case.model_validate(document), plan)[0] == math.inf


def test_what_can_not_end_before_the_cutoff_is_given_up() -> None:
    case = drawn_case(3)
    plan = construct(case)
    routes, priorities = [route(case, each.path) for each in plan.microbatches], [0.0] * len(plan.microbatches)
    seconds = run(case, routes, priorities)
    assert run(case, routes, priorities, cutoff_s=seconds + 1e-6) == seconds
    assert run(case, routes, priorities, cutoff_s=seconds - 1e-6) == math.inf
