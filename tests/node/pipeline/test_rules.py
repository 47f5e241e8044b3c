"""Which paths and plans the rules allow."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from node.pipeline.construct import construct
from node.pipeline.improve import Annealing, improve
from node.pipeline.plan import Microbatch, Plan
from node.pipeline.rules import is_order, orders, violations
from protocol.errors import UserError
from tests.node.pipeline import referee
from tests.node.pipeline.cases import drawn_case, drawn_document


@pytest.mark.parametrize(
    ("stages", "is_allowed"),
    [
        ((0,), True),
        ((0, 1, 2, 3), True),
        ((0, 4, 3), True),  # one stage back, once
        ((0, 4, 2), False),  # two stages back
        ((0, 2, 1, 4, 3), True),  # two swaps
        ((0, 2, 1, 4, 3, 6, 5), False),  # three
        ((0, 4, 5), True),
        ((0, 5), False),  # five ahead
        ((0, 1, 1), False),
        ((1, 2), False),
        ((0, 1, 0), False),
        ((), False),
    ],
)
def test_orders_one_by_one(stages: tuple[int, ...], is_allowed: bool) -> None:
    assert is_order(stages) == is_allowed


@pytest.mark.parametrize(("num_stages", "path_length"), [(1, 1), (4, 3), (6, 4), (7, 7), (7, 2)])
def test_all_orders_are_found(num_stages: int, path_length: int) -> None:
    expected = {order for order in itertools.permutations(range(num_stages), path_length) if is_order(order)}
    found = orders(num_stages, path_length)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_without_swaps_stages_come_in_order() -> None:
    everything = orders(6, 4)
    assert orders(6, 4, swaps=False) == tuple(order for order in everything if list(order) == sorted(order))
    assert orders(4, 4, swaps=False) == ((0, 1, 2, 3),)
    case = drawn_case(3, swaps=False)
    plan = improve(case, construct(case), Annealing(seconds=60.0, max_evaluations=300))[0]
    assert violations(case, plan) == []
    stage_of = {node: stage for stage, nodes in enumerate(plan.partition) for node in nodes}
    visited = [[stage_of[node] for node in each.path] for each in plan.microbatches]
    assert all(stages == sorted(stages) for stages in visited)


def test_too_many_orders_are_told_and_not_made() -> None:
    with pytest.raises(UserError, match="paths of 24 of 32 stages have more than 50,000 orders"):
        orders(32, 24)


def broken(plan: Plan, how: str) -> Plan:
    """A copy that breaks one rule."""
    first, second, *rest = plan.microbatches
    path = first.path
    if how == "path too short":
        first = Microbatch(path=path[:-1])
    elif how == "stage twice":
        first = Microbatch(path=(*path[:-1], path[-2]))
    elif how == "unknown node":
        first = Microbatch(path=(*path[:-1], 999))
    elif how == "does not start in stage 0":
        first = Microbatch(path=(path[1], path[0], *path[2:]))
    elif how == "starts too few":
        return replace(plan, microbatches=(second, *rest))
    elif how == "node missing":
        return replace(plan, partition=(plan.partition[0][1:], *plan.partition[1:]))
    elif how == "sizes":
        moved = (*plan.partition[0], plan.partition[1][0])
        return replace(plan, partition=(moved, plan.partition[1][1:], *plan.partition[2:]))
    elif how == "too many visits":
        busy = plan.partition[1][0]
        paths = [tuple(busy if node in plan.partition[1] else node for node in each.path) for each in plan.microbatches]
        return replace(plan, microbatches=tuple(Microbatch(path=path) for path in paths))
    return replace(plan, microbatches=(first, second, *rest))


HOWS = [
    "path too short",
    "stage twice",
    "unknown node",
    "does not start in stage 0",
    "starts too few",
    "node missing",
    "sizes",
    "too many visits",
]


@pytest.mark.parametrize("how", HOWS)
def test_every_broken_rule_is_found(how: str) -> None:
    document, case = drawn_document(5), drawn_case(5)
    plan = construct(case)
    assert violations(case, plan) == []
    assert referee.violations(document, plan.to_json()) == []
    wrong = broken(plan, how)
    assert violations(case, wrong)
    assert referee.violations(document, wrong.to_json())


def test_a_given_partition_is_kept() -> None:
    case = drawn_case(1)
    plan = construct(case)
    other = (plan.partition[1], plan.partition[0], *plan.partition[2:])
    assert violations(case.model_copy(update={"partition": plan.partition}), plan) == []
    assert violations(case.model_copy(update={"partition": other}), plan) == ["the partition is not the one given"]
