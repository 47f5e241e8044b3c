"""Make a plan better: simulated annealing over paths, priorities and, where it is free, the partition.

Every move keeps the rules, so each state is a plan:

    exchange    two microbatches swap one node each, of the same stage or of different ones
    tail        two microbatches swap what follows after some position
    reorder     one microbatch visits its stages in another order
    replace     one microbatch takes a node that has a visit left
    promote     one microbatch goes before or after another one, or they change places
    cross       two nodes change their stages, and with them all visits

A move is judged by a whole simulated iteration (node/pipeline/replay.py). What makes that affordable: the threshold of
acceptance is drawn before, not after, and the simulation is given up as soon as it must end beyond it.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from node.pipeline.case import Case
from node.pipeline.plan import Microbatch, Plan
from node.pipeline.replay_native import Replayer
from node.pipeline.rules import orders

__all__ = ["Annealing", "improve"]

_TRIES = 8
_STEPS_PER_LOOK = 16
"""Moves between two looks at the clock."""
_LEAST_MEAN_LEFT = 0.7
"""No single move brings the mean end below this share of what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Annealing:
    """How to search.

    Args:
        seconds: wall time.
        seed: of all draws; two runs differ all the same if they end by the clock.
        hottest: temperature at the start, as a share of the iteration time.
        coldest: and at the end.
        max_evaluations: end after so many simulated iterations; a run that ends by this is repeatable.
    """

    seconds: float
    seed: int = 0
    hottest: float = 0.004
    coldest: float = 0.0003
    mean_weight: float = 0.1
    focus: float = 0.1
    max_evaluations: int = 1 << 62


@dataclass(slots=True)
class _Change:
    """New paths and priorities by microbatch, and the two nodes that change their stages."""

    paths: dict[int, list[int]] = field(default_factory=dict)
    priorities: NDArray[np.float64] | None = None
    crossed: tuple[int, int] | None = None


def improve(case: Case, plan: Plan, annealing: Annealing) -> tuple[Plan, int]:
    """Anneal, starting from `plan`, which keeps the rules.

    Returns:
        The best plan met, and how many iterations were simulated.
    """
    search = _Search(case, plan, annealing)
    begun_s = time.perf_counter()
    steps, share = 0, 0.0
    while share < 1.0:
        temperature = annealing.hottest * (annealing.coldest / annealing.hottest) ** share
        for _ in range(_STEPS_PER_LOOK):
            search.step(temperature)
        steps += _STEPS_PER_LOOK
        elapsed_s = time.perf_counter() - begun_s
        share = max(elapsed_s / max(annealing.seconds, 1e-9), steps / annealing.max_evaluations)
    return search.best(), search.num_evaluations


class _Search:
    def __init__(self, case: Case, plan: Plan, annealing: Annealing) -> None:
        self._case, self._dispatch, self._annealing = case, plan.dispatch, annealing
        self._rng = random.Random(annealing.seed)
        self._replayer = Replayer(case)
        # In the order of the priorities, since ties go by number.
        microbatches = sorted(plan.microbatches, key=lambda each: each.priority)
        self._paths = [list(each.path) for each in microbatches]
        self._table = np.array(self._paths, dtype=np.int32)  # the same, for the replayer
        self._priorities = np.arange(len(microbatches), dtype=np.float64)
        self._stage_of = [0] * case.num_nodes
        for stage, nodes in enumerate(plan.partition):
            for node in nodes:
                self._stage_of[node] = stage
        self._visits = np.bincount(self._table.reshape(-1), minlength=case.num_nodes).tolist()
        allowed = orders(case.num_stages, case.path_length, swaps=case.swaps)
        self._orders = frozenset(allowed)
        self._orders_of: dict[frozenset[int], list[tuple[int, ...]]] = defaultdict(list)
        for order in allowed:
            self._orders_of[frozenset(order)].append(order)
        self._moves = self._choose_moves()
        self.num_evaluations = 0
        self._ends, self._new_ends = np.zeros(len(microbatches)), np.zeros(len(microbatches))
        self._cost, self._best_s, self._mean_end = math.inf, math.inf, 0.0
        self._remember(self._evaluate(math.inf))
        self._cost = self._cost_of(self._best_s)

    def step(self, temperature: float) -> None:
        """Try one move; `temperature` is a share of the present cost."""
        change = self._rng.choice(self._moves)()
        if change is None:
            return
        priorities = self._priorities
        self._put(change.paths)
        if change.priorities is not None:
            self._priorities = change.priorities
        most = self._cost * (1.0 - temperature * math.log(1.0 - self._rng.random()))
        seconds = self._evaluate(most)
        cost = self._cost_of(seconds)
        if cost <= most and seconds < math.inf:
            self._accept(change, seconds, cost)
        else:
            self._put({number: self._paths[number] for number in change.paths})
            self._priorities = priorities

    def _evaluate(self, most: float) -> float:
        """Simulate the table as it is, giving up what must cost more than `most`."""
        self.num_evaluations += 1
        spare = self._annealing.mean_weight * _LEAST_MEAN_LEFT * self._mean_end
        return self._replayer.run(
            self._table, self._priorities, dispatch=self._dispatch, cutoff_s=most - spare, ends=self._new_ends
        )

    def _cost_of(self, seconds: float) -> float:
        """The iteration's end, and a little of its microbatches' mean end: that tells which of two equal plans is nearer to a
        better one."""
        return seconds + self._annealing.mean_weight * float(self._new_ends.sum()) / len(self._new_ends)

    def _put(self, paths: Mapping[int, Sequence[int]]) -> None:
        for number, path in paths.items():
            self._table[number] = path

    def best(self) -> Plan:
        """The best plan so far."""
        partition: list[list[int]] = [[] for _ in range(self._case.num_stages)]
        for node, stage in enumerate(self._best_stage_of):
            partition[stage].append(node)
        microbatches = sorted(zip(self._best_priorities, self._best_paths, strict=True))
        return Plan(
            partition=tuple(tuple(stage) for stage in partition),
            microbatches=tuple(Microbatch(path=tuple(path), priority=priority) for priority, path in microbatches),
            dispatch=self._dispatch,
        )

    def _remember(self, seconds: float) -> None:
        if seconds < self._best_s or self._best_s == math.inf:
            self._best_s, self._best_paths = seconds, self._table.tolist()
            self._best_priorities, self._best_stage_of = self._priorities.tolist(), self._stage_of.copy()

    def _accept(self, change: _Change, seconds: float, cost: float) -> None:
        for number, path in change.paths.items():
            for node in self._paths[number]:
                self._visits[node] -= 1
            for node in path:
                self._visits[node] += 1
            self._paths[number] = path
        if change.crossed is not None:
            a, b = change.crossed
            self._stage_of[a], self._stage_of[b] = self._stage_of[b], self._stage_of[a]
        self._cost = cost
        self._ends, self._new_ends = self._new_ends, self._ends
        self._mean_end = float(self._ends.mean())
        self._remember(seconds)

    def _choose_moves(self) -> list[Callable[[], _Change | None]]:
        case = self._case
        weights = [(self._exchange, 6), (self._tail, 3), (self._promote, 3)]
        if len(self._orders) > 1:
            weights.append((self._reorder, 2))
        if sum(case.max_visits) > sum(self._visits):
            weights.append((self._replace, 4))
        if case.partition is None and case.num_stages > 1:
            weights.append((self._cross, 2))
        return [move for move, weight in weights for _ in range(weight)]

    def _stages(self, path: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._stage_of[node] for node in path)

    def _legal(self, path: list[int]) -> list[int] | None:
        """`path` if its order is allowed; else with its stages in ascending order, if that is."""
        if self._stages(path) in self._orders:
            return path
        path = sorted(path, key=self._stage_of.__getitem__)
        return path if self._stages(path) in self._orders else None

    def _exchange(self) -> _Change | None:
        rng, paths, stage_of = self._rng, self._paths, self._stage_of
        wants_same_stage, length = rng.random() < 0.6, self._case.path_length
        for _ in range(_TRIES):
            first, second = self._pick(), int(rng.random() * len(paths))
            a, b = paths[first][int(rng.random() * length)], paths[second][int(rng.random() * length)]
            is_same_stage = stage_of[a] == stage_of[b]
            if (
                first == second
                or a == b
                or is_same_stage != wants_same_stage
                or (0 in (stage_of[a], stage_of[b]) and not is_same_stage)
            ):
                continue
            if not is_same_stage and (b in paths[first] or a in paths[second]):
                continue
            one = self._legal([b if node == a else node for node in paths[first]])
            other = self._legal([a if node == b else node for node in paths[second]])
            if one and other:
                return _Change({first: one, second: other})
        return None

    def _tail(self) -> _Change | None:
        rng, paths = self._rng, self._paths
        for _ in range(_TRIES):
            first, second = self._pick(), int(rng.random() * len(paths))
            cut = rng.randrange(1, max(2, self._case.path_length))
            if first == second or paths[first][cut:] == paths[second][cut:]:
                continue
            one = self._legal(paths[first][:cut] + paths[second][cut:])
            other = self._legal(paths[second][:cut] + paths[first][cut:])
            if one and other:
                return _Change({first: one, second: other})
        return None

    def _reorder(self) -> _Change | None:
        number = self._pick()
        stages = self._stages(self._paths[number])
        order = self._rng.choice(self._orders_of[frozenset(stages)])
        if order == stages:
            return None
        node_of = dict(zip(stages, self._paths[number], strict=True))
        return _Change({number: [node_of[stage] for stage in order]})

    def _replace(self) -> _Change | None:
        rng = self._rng
        for _ in range(_TRIES):
            node = int(rng.random() * self._case.num_nodes)
            if self._visits[node] >= self._case.max_visits[node] or self._stage_of[node] == 0:
                continue
            number = rng.randrange(len(self._paths))
            path = self._paths[number]
            if node in path:
                continue
            stages = self._stages(path)
            # A path that visits the node's stage already takes it there, another one in the place of any later stage.
            stage = self._stage_of[node]
            place = stages.index(stage) if stage in stages else rng.randrange(1, max(2, len(path)))
            if place < len(path):
                changed = self._legal([*path[:place], node, *path[place + 1 :]])
                if changed:
                    return _Change({number: changed})
        return None

    def _promote(self) -> _Change | None:
        rng, priorities = self._rng, self._priorities.copy()
        first, second = self._pick(), int(rng.random() * len(priorities))
        if first == second:
            return None
        if rng.random() < 0.5:
            priorities[[first, second]] = priorities[[second, first]]
        else:
            priorities[first] = priorities[second] + rng.choice((-0.5, 0.5))
            priorities = priorities.argsort().argsort().astype(np.float64)
        return _Change(priorities=priorities)

    def _pick(self) -> int:
        """A microbatch; now and then the one that ends last."""
        if self._rng.random() < self._annealing.focus:
            return int(self._ends.argmax())
        return int(self._rng.random() * len(self._paths))

    def _cross(self) -> _Change | None:
        case, rng, stage_of, visits = self._case, self._rng, self._stage_of, self._visits
        a, b = int(rng.random() * case.num_nodes), int(rng.random() * case.num_nodes)
        if stage_of[a] == stage_of[b] or visits[a] > case.max_visits[b] or visits[b] > case.max_visits[a]:
            return None
        if 0 in (stage_of[a], stage_of[b]) and case.starts(a) != case.starts(b):
            return None
        other = {a: b, b: a}
        paths = {
            number: [other.get(node, node) for node in path]
            for number, path in enumerate(self._paths)
            if a in path or b in path
        }
        return _Change(paths, crossed=(a, b))
