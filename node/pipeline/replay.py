"""How long an iteration takes: an event simulation of one plan.

A microbatch runs forward along its path, its loss at its first node, then backward along the same path. A node does one task at a
time; a forward pass takes one of its slots, which is free again when that microbatch's backward pass starts there. Activations
and gradients travel for `link_s`, and longer where transfers share lines (node/pipeline/lines.py).

This is the planner's innermost loop: plain tuples, and a plan that can not be finished before `cutoff_s` any more is given up.
It agrees with the published cost model to the last digit (tests/node/pipeline), and so does its twin, node/pipeline/replay.c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

from node.pipeline.case import Case
from node.pipeline.lines import Lines
from node.pipeline.plan import Dispatch, Plan

__all__ = ["BACKWARD", "FORWARD", "LOSS", "Done", "Route", "replay", "route", "run"]

FORWARD, LOSS, BACKWARD = 0, 1, 2
_SAME_TIME_S = 1e-12


Step = tuple[int, int, float, float, float, float]
"""One task of a microbatch: node; FORWARD, LOSS or BACKWARD; its seconds; seconds for which the node rests after it; seconds to the
next task's node; and seconds from its arrival to the end of all if nothing has to wait."""
Route = tuple[Step, ...]
"""A microbatch's tasks in order. Made once per path, since most paths of two plans are the same."""
_Waiting = tuple[float, float, int, int]


class Done(NamedTuple):
    """One task of a finished iteration."""

    node: int
    microbatch: int
    kind: int
    start_s: float
    end_s: float


def route(case: Case, path: Sequence[int]) -> Route:
    """The tasks of a microbatch on this path."""
    forward_s, link_s = case.forward_s, case.link_s
    steps = len(path)
    nodes = (*path, path[0], *reversed(path))
    kinds = (*[FORWARD] * steps, LOSS, *[BACKWARD] * steps)
    factor = (1.0, case.loss_multiplier, case.backward_multiplier)
    durations = tuple(factor[kind] * forward_s[node] for node, kind in zip(nodes, kinds, strict=True))
    gaps = (case.gap_first_s,) + (case.gap_s,) * (len(nodes) - 1)
    travel = (*tuple(0.0 if a == b else link_s[a][b] for a, b in pairwise(nodes)), 0.0)
    left = [0.0]
    for duration, travel_s in zip(reversed(durations), reversed(travel), strict=True):
        left.append(left[-1] + travel_s + duration)
    return tuple(zip(nodes, kinds, durations, gaps, travel, reversed(left[1:]), strict=True))


def replay(case: Case, plan: Plan) -> tuple[float, list[Done]]:
    """Seconds of the iteration, infinite if microbatches wait for each other's slots for ever, and every task that was done."""
    done: list[Done] = []
    routes = [route(case, each.path) for each in plan.microbatches]
    priorities = [each.priority for each in plan.microbatches]
    return run(case, routes, priorities, dispatch=plan.dispatch, record=done) + case.closing_s, done


def run(
    case: Case,
    routes: Sequence[Route],
    priorities: Sequence[float],
    *,
    dispatch: Dispatch = "fifo",
    cutoff_s: float = math.inf,
    ends: list[float] | None = None,
    record: list[Done] | None = None,
) -> float:
    """Seconds to the end of the last backward pass; infinite if it never ends, or would end after `cutoff_s`.

    Args:
        case: the problem.
        routes: of all microbatches.
        priorities: of each; ties go by number.
        dispatch: how nodes choose.
        cutoff_s: when to give up.
        ends: takes the end of every microbatch, if the result is finite.
        record: takes every task, in the order in which they start.
    """
    num_nodes = case.num_nodes
    free_at, slots = [0.0] * num_nodes, list(case.slots_per_node)
    wakes = [False] * num_nodes  # whether an event will come when the node is free
    # Waiting tasks: forward passes apart from the others, since only they need a slot.
    forward: list[list[_Waiting]] = [[] for _ in range(num_nodes)]
    others: list[list[_Waiting]] = [[] for _ in range(num_nodes)]
    lines = Lines(case) if case.shares_lines else None
    nodes_of = [tuple(step[0] for step in steps) for steps in routes] if lines else []
    by_arrival, others_first = dispatch == "fifo", dispatch == "backward_first"
    ends = [0.0] * len(routes) if ends is None else ends
    num_left = len(routes)
    # (time, microbatch, index of its task); a negative microbatch means that node −1 − microbatch becomes free, a negative index
    # that a transfer begins.
    events: list[tuple[float, int, int]] = [(0.0, number, 0) for number in range(len(routes))]
    touched: set[int] = set()
    while True:
        if lines:
            lines.carry(events, nodes_of)
        if not events:
            break
        now, number, index = heappop(events)
        touched.clear()
        limit = now + _SAME_TIME_S
        while True:  # everything that happens now, before any node chooses
            if number < 0:
                node = -1 - number
                wakes[node] = False
            else:
                node, kind, _, _, _, left = routes[number][index]
                if now + left > cutoff_s:
                    return math.inf
                rank = priorities[number]
                waiting = (now, rank, number, index) if by_arrival else (rank, now, number, index)
                heappush(others[node] if kind else forward[node], waiting)
            if not events or events[0][0] > limit or events[0][2] < 0:
                break
            touched.add(node)
            _, number, index = heappop(events)
        touched.add(node)
        for node in sorted(touched):
            queue, entering = others[node], forward[node]
            if free_at[node] > limit:
                if not wakes[node]:
                    wakes[node] = True
                    heappush(events, (free_at[node], -1 - node, 0))
                continue
            if entering and slots[node] and (not queue or (not others_first and entering[0] < queue[0])):
                queue = entering
            if not queue:
                continue
            _, _, number, index = heappop(queue)
            steps = routes[number]
            _, kind, duration, gap, travel, left = steps[index]
            if now + left > cutoff_s:
                return math.inf
            slots[node] += kind - 1  # FORWARD takes one, LOSS leaves them, BACKWARD gives one back
            end = now + duration
            free_at[node] = free = end + gap
            if record is not None:
                record.append(Done(node, number, kind, now, end))
            index += 1
            if index == len(steps):
                num_left -= 1
                ends[number] = end
            else:
                if lines and steps[index][0] != node:
                    heappush(events, (end, number, ~index))
                else:
                    heappush(events, (end + travel, number, index))
            if (entering or others[node]) and not wakes[node]:
                wakes[node] = True
                heappush(events, (free, -1 - node, 0))
    return math.inf if num_left else max(ends, default=0.0)
