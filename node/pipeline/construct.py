"""A first plan that keeps the rules, made at once; node/pipeline/improve.py makes it good.

Three small exact problems, one after the other, instead of the one that nobody can solve:

    stages    nodes are dealt out fastest first, so that all stages are about equally fast
    orders    how many microbatches take which order of stages: an integer program with one variable per order, because visits
              are often all needed, and a greedy choice would run into a dead end
    nodes     position by position the cheapest assignment of microbatches to the visits that the nodes of a stage have left
"""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp

from node.pipeline.case import Case, Partition
from node.pipeline.plan import Microbatch, Plan
from node.pipeline.rules import orders
from protocol.errors import UserError

__all__ = ["construct"]


def construct(case: Case, *, seed: int = 0) -> Plan:
    """A plan without violations.

    Args:
        seed: of the order in which microbatches choose, and of the partition, if that is free.

    Raises:
        UserError: the nodes do not have as many visits as the microbatches need.
    """
    rng = random.Random(seed)
    partition = case.partition or _deal(case, rng)
    starts = [node for node in partition[0] for _ in range(case.starts(node))]
    if any(case.starts(node) > case.max_visits[node] for node in partition[0]):
        raise _too_few_visits(case)
    rng.shuffle(starts)
    wanted = _choose_orders(case, partition, len(starts))
    rng.shuffle(wanted)
    paths = [[node] for node in starts]
    left = list(case.max_visits)
    for position in range(1, case.path_length):
        _assign(case, partition, paths, [order[position] for order in wanted], left)
    ranks = list(range(len(paths)))
    rng.shuffle(ranks)
    microbatches = (Microbatch(path=tuple(path), priority=float(rank)) for path, rank in zip(paths, ranks, strict=True))
    return Plan(partition=partition, microbatches=tuple(microbatches))


def _deal(case: Case, rng: random.Random) -> Partition:
    """Nodes to stages: the fastest node left goes to the stage that has the least speed per place so far."""
    shuffled = rng.sample(range(case.num_nodes), case.num_nodes)
    speeds = [0.0] * case.num_stages
    stages: list[list[int]] = [[] for _ in range(case.num_stages)]
    for node in sorted(shuffled, key=case.forward_s.__getitem__):
        open_stages = [stage for stage, size in enumerate(case.stage_sizes) if len(stages[stage]) < size]
        stage = min(open_stages, key=lambda each: (speeds[each] / case.stage_sizes[each], rng.random()))
        stages[stage].append(node)
        speeds[stage] += 1.0 / case.forward_s[node]
    return tuple(tuple(sorted(stage)) for stage in stages)


def _choose_orders(case: Case, partition: Partition, num_microbatches: int) -> list[tuple[int, ...]]:
    """One order of stages per microbatch: least mean travel, and no stage visited more often than its nodes allow."""
    choices = orders(case.num_stages, case.path_length, swaps=case.swaps)
    link_s = np.asarray(case.link_s)
    between = np.array([[link_s[np.ix_(a, b)].mean() for b in partition] for a in partition])
    costs = [sum(between[a, b] + between[b, a] for a, b in (*pairwise(order), (order[-1], 0))) for order in choices]
    visits = np.array([[stage in order for order in choices] for stage in range(1, case.num_stages)], dtype=float)
    caps = [sum(case.max_visits[node] for node in stage) for stage in partition[1:]]
    constraints = [LinearConstraint(np.ones((1, len(choices))), num_microbatches, num_microbatches)]
    if len(visits):
        constraints.append(LinearConstraint(visits, ub=caps))
    result = milp(costs, integrality=np.ones(len(choices)), bounds=Bounds(lb=0), constraints=constraints)
    if result.x is None:
        raise _too_few_visits(case)
    return [order for order, count in zip(choices, result.x, strict=True) for _ in range(round(count))]


def _too_few_visits(case: Case) -> UserError:
    return UserError(
        f"{case.name}: paths of {case.path_length} stages need more visits than the nodes have; raise max_visits, "
        "or lower path_length"
    )


def _assign(case: Case, partition: Partition, paths: list[list[int]], stages: list[int], left: list[int]) -> None:
    """Append the next node to every path; `left` visits become fewer."""
    by_stage = defaultdict(list)
    for path, stage in zip(paths, stages, strict=True):
        by_stage[stage].append(path)
    for stage, waiting in by_stage.items():
        # A node's visits are handed out in turn: the first ones are the cheaper, so that nodes are used evenly.
        places = [(node, turn) for node in partition[stage] for turn in range(left[node])]
        costs = [
            [
                case.link_s[path[-1]][node] + case.link_s[node][path[-1]] + turn * case.forward_s[node]
                for node, turn in places
            ]
            for path in waiting
        ]
        for row, column in zip(*linear_sum_assignment(np.array(costs)), strict=True):
            node = places[column][0]
            waiting[row].append(node)
            left[node] -= 1
