"""First plans, better plans, and bounds."""

from __future__ import annotations

import itertools

import pytest

from node.pipeline import bounds
from node.pipeline.bounds import lower_bound
from node.pipeline.case import Case
from node.pipeline.construct import construct
from node.pipeline.improve import Annealing, improve
from node.pipeline.plan import Microbatch, Plan
from node.pipeline.replay import replay
from node.pipeline.rules import orders, violations
from node.pipeline.solver import solve
from protocol.errors import UserError
from tests.node.pipeline.cases import drawn_case

SEEDS = range(10)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_first_plan_keeps_the_rules(seed: int) -> None:
    for case in (drawn_case(seed), drawn_case(seed).full_pipeline()):
        plan = construct(case, seed=seed)
        assert violations(case, plan) == []
        assert plan == construct(case, seed=seed)


def test_too_few_visits_are_told() -> None:
    case = drawn_case(0, max_visits=1)
    with pytest.raises(UserError, match="need more visits than the nodes have; raise max_visits"):
        construct(case)


def test_nodes_are_dealt_so_that_stages_are_equally_fast() -> None:
    case = drawn_case(2)
    plan = construct(case)
    speeds = [sum(1 / case.forward_s[node] for node in stage) for stage in plan.partition]
    assert max(speeds) < 2.5 * min(speeds)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("is_free", [True, False])
def test_improving_keeps_the_rules_and_never_makes_worse(seed: int, is_free: bool) -> None:
    case = drawn_case(seed)
    plan = construct(case, seed=seed)
    if not is_free:
        case = case.model_copy(update={"partition": plan.partition})
    annealing = Annealing(seconds=60.0, seed=seed, max_evaluations=300)
    better, _ = improve(case, plan, annealing)
    assert violations(case, better) == []
    assert replay(case, better)[0] <= replay(case, plan)[0]
    assert improve(case, plan, annealing)[0] == better


def test_spare_visits_go_to_the_fast_nodes() -> None:
    case = drawn_case(4, max_visits=12)
    plan = construct(case)
    better, _ = improve(case, plan, Annealing(seconds=60.0, max_evaluations=2000))
    assert violations(case, better) == []
    assert replay(case, better)[0] < replay(case, plan)[0]


def best_of_all(case: Case, partition: tuple[tuple[int, ...], ...]) -> float:
    """The least iteration time over all paths, priorities apart."""
    (origin,) = partition[0]
    paths = [
        (origin, *rest)
        for order in orders(case.num_stages, case.path_length)
        for rest in itertools.product(*(partition[stage] for stage in order[1:]))
    ]
    plans = (
        Plan(partition=partition, microbatches=tuple(Microbatch(path=path) for path in chosen))
        for chosen in itertools.combinations_with_replacement(paths, case.starts(origin))
    )
    return min(replay(case, plan)[0] for plan in plans if not violations(case, plan))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slots", [1, 3])
def test_nothing_beats_the_bound(monkeypatch: pytest.MonkeyPatch, seed: int, slots: int) -> None:
    """Small enough to try everything; the rough bound, for large swarms, is below the exact one."""
    drawn = drawn_case(seed)
    document = drawn.model_dump() | {
        "num_nodes": 5,
        "stage_sizes": (1, 2, 2),
        "path_length": 2,
        "slots_per_node": slots,
        "rounds": 3 // slots,
        "max_visits": 3,
        "forward_s": drawn.forward_s[:5],
        "link_s": tuple(row[:5] for row in drawn.link_s[:5]),
    }
    case = Case.model_validate(document)
    plan = construct(case)
    bound_s = lower_bound(case, plan)
    assert 0.5 * best_of_all(case, plan.partition) < bound_s <= best_of_all(case, plan.partition) + 1e-9
    monkeypatch.setattr(bounds, "MAX_PATHS", 0)
    assert 0.0 < lower_bound(case, plan) <= bound_s + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bound_is_below_what_was_found(seed: int) -> None:
    case = drawn_case(seed)
    solution = solve(case, seconds=0.2, processes=1)
    assert violations(case, solution.plan) == []
    assert 0.0 < solution.bound_s <= solution.iteration_s
    assert all(0.0 <= share <= 1.0 for share in solution.utilisation(case))


def test_stopping_early_still_bounds() -> None:
    case = drawn_case(7)
    plan = construct(case)
    assert 0.0 < lower_bound(case, plan, seconds=0.0) <= lower_bound(case, plan) + 1e-9
