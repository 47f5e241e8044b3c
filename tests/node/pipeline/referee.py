"""The published cost model and rules, written down as plainly as possible and apart from the planner: the tests' oracle.

It knows nothing of the planner's data structures: a case and a plan are decoded JSON.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Any

__all__ = ["replay", "violations"]

Json = dict[str, Any]
Waiting = tuple[tuple[float, ...], int, int]


def replay(case: Json, plan: Json) -> float | None:
    """Seconds of the iteration; None if it never ends."""
    forward_s, link_s = case["forward_s"], case["link_s"]
    tasks: list[list[tuple[int, str, float]]] = []
    for each in plan["microbatches"]:
        path = each["path"]
        tasks.append(
            [(node, "F", forward_s[node]) for node in path]
            + [(path[0], "L", case["loss_multiplier"] * forward_s[path[0]])]
            + [(node, "B", case["backward_multiplier"] * forward_s[node]) for node in reversed(path)]
        )
    priorities = [each.get("priority", 0) for each in plan["microbatches"]]
    dispatch = plan.get("dispatch", "fifo")

    def key(microbatch: int, index: int, arrival: float) -> tuple[float, ...]:
        if dispatch == "fifo":
            return (arrival, microbatch, index)
        is_forward = dispatch == "backward_first" and tasks[microbatch][index][1] == "F"
        return (is_forward, priorities[microbatch], arrival, microbatch, index)

    free_at, slots = [0.0] * case["num_nodes"], [case["slots_per_node"]] * case["num_nodes"]
    waiting: list[list[Waiting]] = [[] for _ in free_at]
    done: list[float | None] = [None] * len(tasks)
    tick = itertools.count()
    events: list[tuple[float, int, int, str, int, int]] = [
        (0.0, 1, next(tick), "arrive", microbatch, 0) for microbatch in range(len(tasks))
    ]
    heapq.heapify(events)
    while events:
        now, touched = events[0][0], set()
        while events and events[0][0] <= now + 1e-12:
            _, _, _, what, first, index = heapq.heappop(events)
            node = first if what == "free" else tasks[first][index][0]
            if what == "arrive":
                waiting[node].append((key(first, index, now), first, index))
            touched.add(node)
        for node in touched:
            ready = [each for each in waiting[node] if slots[node] > 0 or tasks[each[1]][each[2]][1] != "F"]
            if free_at[node] > now + 1e-12 or not ready:
                continue
            chosen = min(ready)
            waiting[node].remove(chosen)
            _, microbatch, index = chosen
            _, kind, duration = tasks[microbatch][index]
            slots[node] += {"F": -1, "B": 1, "L": 0}[kind]
            end = now + duration
            free_at[node] = end + (case["gap_first_s"] if index == 0 else case["gap_s"])
            heapq.heappush(events, (free_at[node], 0, next(tick), "free", node, 0))
            if index + 1 < len(tasks[microbatch]):
                there = tasks[microbatch][index + 1][0]
                arrival = end + (link_s[node][there] if there != node else 0.0)
                heapq.heappush(events, (arrival, 1, next(tick), "arrive", microbatch, index + 1))
            else:
                done[microbatch] = end
    ends = [end for end in done if end is not None]
    return max(ends) if len(ends) == len(done) else None


def violations(case: Json, plan: Json) -> list[str]:
    """What is wrong with a plan."""
    if sorted(node for stage in plan["partition"] for node in stage) != list(range(case["num_nodes"])):
        return ["partition does not hold every node once"]
    found = []
    sizes = [len(stage) for stage in plan["partition"]]
    if sizes != case["stage_sizes"]:
        found.append(f"stage sizes {sizes} differ from {case['stage_sizes']}")
    stage_of = {node: stage for stage, nodes in enumerate(plan["partition"]) for node in nodes}
    most = case["slots_per_node"] * case["rounds"]
    starts, visits = dict.fromkeys(plan["partition"][0], 0), [0] * case["num_nodes"]
    for number, each in enumerate(plan["microbatches"]):
        path = each["path"]
        stages = [stage_of.get(node, -1) for node in path]
        is_wrong = len(path) != case["path_length"] or -1 in stages or len(set(stages)) != len(stages)
        if is_wrong or stages[0] != 0:
            found.append(f"microbatch {number}: path {path} visits stages {stages}")
            continue
        furthest = swaps = 0
        for stage in stages[1:]:
            if abs(stage - furthest) > 4 or furthest - stage > 1:
                found.append(f"microbatch {number}: step from {furthest} to {stage}")
            swaps += stage < furthest
            furthest = max(furthest, stage)
        if swaps > 2:
            found.append(f"microbatch {number}: {swaps} swaps")
        starts[path[0]] += 1
        for node in path:
            visits[node] += 1
    found += [f"node {node} starts {count}, not {most}" for node, count in starts.items() if count != most]
    found += [f"node {node} visited {count} times" for node, count in enumerate(visits) if count > most]
    return found
