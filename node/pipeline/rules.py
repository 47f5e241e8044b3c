"""Which paths a microbatch may take through the stages, and whether a plan keeps to the rules.

A path starts in stage 0 and visits `path_length` stages, none twice. It may step back to the stage right before the furthest one
reached so far, at most twice, and a step leads at most four stages away from that furthest one. These are the rules of SkipPipe's
published code (arXiv 2502.19913); a path of all stages in order is an ordinary pipeline.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from node.pipeline.case import Case
from node.pipeline.plan import Plan
from protocol.errors import UserError

__all__ = ["MAX_STEP", "MAX_SWAPS", "is_order", "orders", "violations"]

MAX_SWAPS = 2
MAX_STEP = 4
MAX_ORDERS = 50_000
MAX_REPORTED = 100


def is_order(stages: Sequence[int]) -> bool:
    """Whether a microbatch may visit these stages in this order."""
    if not stages or stages[0] != 0 or len(set(stages)) != len(stages):
        return False
    furthest = swaps = 0
    for stage in stages[1:]:
        if stage < furthest:
            swaps += 1
            if furthest - stage > 1 or swaps > MAX_SWAPS:
                return False
        elif stage - furthest > MAX_STEP:
            return False
        furthest = max(furthest, stage)
    return True


@functools.cache
def orders(num_stages: int, path_length: int, *, swaps: bool = True) -> tuple[tuple[int, ...], ...]:
    """All orders that are allowed, in lexicographic order.

    Args:
        swaps: those that step back, too.

    Raises:
        UserError: there are more than MAX_ORDERS.
    """
    used = 0 if swaps else MAX_SWAPS
    found = tuple(islice(_continue((0,), 0, used, (num_stages, path_length)), MAX_ORDERS + 1))
    if len(found) > MAX_ORDERS:
        raise UserError(
            f"paths of {path_length} of {num_stages} stages have more than {MAX_ORDERS:,} orders; plan fewer stages, or a path "
            "length nearer to their number"
        )
    return found


def _continue(so_far: tuple[int, ...], furthest: int, swaps: int, shape: tuple[int, int]) -> Iterator[tuple[int, ...]]:
    num_stages, path_length = shape
    if len(so_far) == path_length:
        yield so_far
        return
    for stage in range(max(1, furthest - 1), min(num_stages, furthest + MAX_STEP + 1)):
        is_swap = stage < furthest
        if stage not in so_far and swaps + is_swap <= MAX_SWAPS:
            yield from _continue((*so_far, stage), max(furthest, stage), swaps + is_swap, shape)


def violations(case: Case, plan: Plan) -> list[str]:
    """Every way in which a plan breaks the rules, in words; empty for a good one. Nothing in the plan is trusted."""
    if sorted(node for stage in plan.partition for node in stage) != list(range(case.num_nodes)):
        return ["the partition does not hold every node once"]
    sizes = tuple(len(stage) for stage in plan.partition)
    if sizes != case.stage_sizes:
        return [f"stage sizes {list(sizes)} differ from {list(case.stage_sizes)}"]
    if case.partition is not None and [set(stage) for stage in plan.partition] != [set(s) for s in case.partition]:
        return ["the partition is not the one given"]
    stage_of = {node: stage for stage, nodes in enumerate(plan.partition) for node in nodes}
    found: list[str] = []
    starts: Counter[int] = Counter()
    visits: Counter[int] = Counter()
    for number, microbatch in enumerate(plan.microbatches):
        path = microbatch.path
        stages = [stage_of.get(node, -1) for node in path]
        is_legal = is_order(stages) and (case.swaps or stages == sorted(stages))
        if len(path) != case.path_length or -1 in stages or not is_legal:
            found.append(f"microbatch {number}: path {list(path)} visits stages {stages}")
            continue
        starts[path[0]] += 1
        visits.update(path)
    for node in plan.partition[0]:
        if starts[node] != case.starts(node):
            found.append(f"node {node} starts {starts[node]} microbatches, not {case.starts(node)}")
    for node, count in sorted(visits.items()):
        if count > case.max_visits[node]:
            found.append(f"node {node} is visited {count} times, more than {case.max_visits[node]}")
    return found[:MAX_REPORTED]
