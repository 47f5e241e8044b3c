"""How good can a plan be? A lower bound on the iteration time, so that every plan is reported with its gap.

Let x_p be the number of microbatches on path p. With a given partition, T is at least the value of this linear program:

    Σ x_p over the paths from o                  =  starts(o)      for every node o of stage 0
    Σ x_p over the paths through v               ≤  max_visits(v)
    Σ x_p · held(p, v)  +  slots(v) · ends(v)    ≤  slots(v) · T      a slot is held from forward to backward
    Σ x_p · work(v)  +  ends'(v)                 ≤  T                 one task at a time
    Σ x_p · 2 · line(v)  +  ends''(v)            ≤  T                 its uplink, and so its downlink, where lines are shared
    T                                            ≥  the shortest trip of all

where `held` is the time from p's forward pass at v to the end of its backward pass there if nothing has to wait, and `ends` is what
must happen before the first task at v and after the last one, times the share of its possible visits that it has. There is a column
per path, and too many paths to write them all down: they are generated as they are needed, from every node of stage 0 the
cheapest one of every order of stages. Stopping early still leaves a bound: the present value less what the cheapest missing
path could gain for every microbatch. Where even looking at all paths is too much, `held` counts a node's own times and, between
nodes, the least that their stages allow. `closing_s` is added to all of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from node.pipeline.case import Case
from node.pipeline.plan import Plan
from node.pipeline.rules import orders
from node.pipeline.variants import variants

__all__ = ["lower_bound"]

Numbers = NDArray[np.float64]

MAX_PATHS = 20_000_000
"""Most paths to look at in one round of generating columns: about a second's work."""
_CLOSE = 1e-4
"""A bound this near to the program's value, relatively, is near enough."""


class _Column(NamedTuple):
    """A path, and for how long each of its nodes holds a slot for it."""

    path: tuple[int, ...]
    held_s: tuple[float, ...]


class _Duals(NamedTuple):
    """What one more unit of each row's right side is worth, ≤ 0 for inequalities; by node."""

    start: Numbers
    visit: Numbers
    slot: Numbers
    load: Numbers
    """[loads, nodes]"""


def lower_bound(case: Case, plan: Plan, *, seconds: float = 10.0) -> float:
    """No plan with this plan's partition takes less; of a case with variants, no plan has a lower mean.

    Args:
        case: the problem.
        plan: a plan without violations; its paths are the first columns.
        seconds: wall time after which the bound so far is returned.
    """
    drawn = variants(case)
    return sum(_lower_bound(each, plan, seconds=seconds / len(drawn)) for each in drawn) / len(drawn)


def _lower_bound(case: Case, plan: Plan, *, seconds: float) -> float:
    program = _Program(case, plan)
    deadline_s = time.perf_counter() + seconds
    best = program.shortest_trip_s
    while True:
        value, duals = program.solve()
        new, gain = program.generate(duals)
        best = max(best, value - gain)
        if not new or gain <= _CLOSE * value or time.perf_counter() >= deadline_s:
            return best + case.closing_s
        program.columns |= dict.fromkeys(new)


class _Program:
    """The linear program of one case and partition."""

    def __init__(self, case: Case, plan: Plan) -> None:
        self._case, self._stages = case, [np.array(stage) for stage in plan.partition]
        self._orders = orders(case.num_stages, case.path_length)
        self._forward = np.array(case.forward_s)
        self._backward = self._forward * case.backward_multiplier
        self._loss = self._forward * case.loss_multiplier
        link = np.array(case.link_s)
        np.fill_diagonal(link, 0.0)
        self._both_ways = link + link.T
        head, tail = self._ends(link)
        work, self._slot_share = self._shares(head, tail)
        self._loads = np.stack([work, *self._lines(head, tail)])
        """What one visit takes of a node's processor, and of its two lines where they are shared [loads, nodes]."""
        num_paths = sum(math.prod(len(self._stages[stage]) for stage in order) for order in self._orders)
        self._is_exact = num_paths <= MAX_PATHS
        held = self._held if self._is_exact else self._least_held
        self.columns: dict[_Column, None] = {}
        stage_of = {node: stage for stage, nodes in enumerate(plan.partition) for node in nodes}
        for each in plan.microbatches:
            self.columns[held(each.path, tuple(stage_of[node] for node in each.path))] = None
        self.shortest_trip_s = min(self._trips())

    def solve(self) -> tuple[float, _Duals]:
        """The value with the columns so far, and what the rows are worth."""
        case, num_nodes = self._case, self._case.num_nodes
        columns = list(self.columns)
        through = np.zeros((num_nodes, len(columns)))
        held = np.zeros_like(through)
        begins = np.zeros_like(through)
        for number, column in enumerate(columns):
            through[list(column.path), number] = 1.0
            held[list(column.path), number] = column.held_s
            begins[column.path[0], number] = 1.0
        slots = np.array(case.slots_per_node, dtype=float)
        # The last variable is T.
        rows = np.vstack([
            np.hstack([through, np.zeros((num_nodes, 1))]),
            np.hstack([held + through * self._slot_share[:, None], -slots[:, None]]),
            *(np.hstack([through * load[:, None], -np.ones((num_nodes, 1))]) for load in self._loads),
        ])  # fmt: skip
        limits = np.concatenate([
            np.array(case.max_visits, dtype=float),
            slots * case.gap_s,
            np.full(num_nodes, case.gap_s),
            np.zeros(num_nodes * (len(self._loads) - 1)),
        ])  # fmt: skip
        origins = self._stages[0]
        starts = np.array([case.starts(int(node)) for node in origins], dtype=float)
        result = linprog(
            np.append(np.zeros(len(columns)), 1.0),
            A_ub=rows,
            b_ub=limits,
            A_eq=np.hstack([begins[origins], np.zeros((len(origins), 1))]),
            b_eq=starts,
            bounds=[(0, None)] * len(columns) + [(self.shortest_trip_s, None)],
            method="highs",
        )
        assert result.status == 0, f"the plan's own paths are a solution: {result.message}"
        start = np.zeros(num_nodes)
        start[origins] = result.eqlin.marginals
        visit, slot, *load = np.split(result.ineqlin.marginals, 2 + len(self._loads))
        return float(result.fun), _Duals(start, visit, slot, np.stack(load))

    def generate(self, duals: _Duals) -> tuple[list[_Column], float]:
        """Columns that would lower the value, and at most by how much all missing columns together could."""
        price = self._price_exactly if self._is_exact else self._price_roughly
        worst = {int(node): 0.0 for node in self._stages[0]}
        new = []
        for order in self._orders:
            for reduced, column in price(order, duals):
                if reduced < -1e-9:
                    new.append(column)
                worst[column.path[0]] = min(worst[column.path[0]], reduced)
        gain = -sum(self._case.starts(node) * reduced for node, reduced in worst.items())
        return [column for column in new if column not in self.columns], gain

    def _price_exactly(self, order: tuple[int, ...], duals: _Duals) -> Iterator[tuple[float, _Column]]:
        """The cheapest path of this order from every node of stage 0, with its reduced cost."""
        stages = [self._stages[stage] for stage in order]
        own = self._own_price(duals) - duals.slot * self._forward
        cost: Numbers = (own - duals.start)[stages[0]]
        held: Numbers = -duals.slot[stages[0]]  # what the slots held so far cost per second
        for before, stage in pairwise(stages):
            pause = self._both_ways[np.ix_(before, stage)] + (self._forward + self._backward)[stage]
            cost = cost[..., None] + held[..., None] * pause + own[stage]
            held = held[..., None] - duals.slot[stage]
        closing = self._closing(stages[0], stages[-1]) if len(stages) > 1 else self._loss[stages[0]]
        closing = closing.reshape((len(stages[0]), *[1] * (len(stages) - 2), *closing.shape[1:]))
        cost = (cost + held * closing).reshape(len(stages[0]), -1)
        shape = [len(stage) for stage in stages[1:]]
        for row, choice in enumerate(cost.argmin(axis=1)):
            places = np.unravel_index(choice, shape) if shape else ()
            path = (int(stages[0][row]), *(int(stage[place]) for stage, place in zip(stages[1:], places, strict=True)))
            yield float(cost[row, choice]), self._held(path, order)

    def _price_roughly(self, order: tuple[int, ...], duals: _Duals) -> Iterator[tuple[float, _Column]]:
        """The same with the least times between stages, for which the nodes can be chosen one by one."""
        rest = self._least_rest(order)
        own = self._own_price(duals)
        picks = []
        for stage, rest_s in zip(order[1:], rest[1:], strict=True):
            costs = (own - duals.slot * (self._forward + rest_s))[self._stages[stage]]
            picks.append((float(costs.min()), int(self._stages[stage][costs.argmin()])))
        for node in map(int, self._stages[0]):
            first = float((own - duals.start - duals.slot * (self._forward + rest[0]))[node])
            path = (node, *(pick for _, pick in picks))
            yield first + sum(cost for cost, _ in picks), self._least_held(path, order)

    def _held(self, path: tuple[int, ...], order: tuple[int, ...]) -> _Column:
        """How long each node of a path holds its slot, from the last one to the first."""
        del order
        rest = self._loss[path[0]] + self._both_ways[path[-1], path[0]]
        held = []
        for here, before in zip(reversed(path), [*reversed(path[:-1]), None], strict=True):
            held.append(float(rest + self._forward[here]))
            if before is not None:
                rest += self._forward[here] + self._backward[here] + self._both_ways[before, here]
        return _Column(path, tuple(reversed(held)))

    def _least_held(self, path: tuple[int, ...], order: tuple[int, ...]) -> _Column:
        rest = self._least_rest(order)
        own = self._forward[list(path)]
        return _Column(path, tuple(float(time_s) for time_s in own + rest))

    def _least_rest(self, order: tuple[int, ...]) -> Numbers:
        """For every position of an order the least time between the end of its forward pass and its backward pass."""
        stages = [self._stages[stage] for stage in order]
        both = self._forward + self._backward
        rest = [float(self._closing(stages[0], stages[-1]).min())]
        for before, stage in reversed(list(pairwise(stages))):
            rest.append(rest[-1] + float((self._both_ways[np.ix_(before, stage)] + both[stage]).min()))
        return np.array(rest[::-1])

    def _closing(self, origins: NDArray[np.int64], lasts: NDArray[np.int64]) -> Numbers:
        """From the last node to the loss and back, [origins, lasts]."""
        closing: Numbers = self._both_ways[np.ix_(origins, lasts)] + self._loss[origins][:, None]
        return closing

    def _own_price(self, duals: _Duals) -> Numbers:
        """What a visit costs at each node, apart from the time for which it holds a slot."""
        price: Numbers = -duals.visit - (duals.load * self._loads).sum(axis=0) - duals.slot * self._slot_share
        return price

    def _lines(self, head: Numbers, tail: Numbers) -> list[Numbers]:
        """What one visit takes of a node's uplink and downlink: two payloads each, and its part of the time before the first one
        leaves and after the last one has come."""
        case = self._case
        if not case.shares_lines or case.path_length == 1:
            return []
        visits = self._most_visits()
        up = 2.0 * np.array(case.uplink_s) + (head + self._forward) / visits
        down = 2.0 * np.array(case.downlink_s) + (self._backward + tail) / visits
        return [up, down]

    def _most_visits(self) -> Numbers:
        visits = np.array(self._case.max_visits, dtype=float)
        visits[self._stages[0]] = [self._case.starts(int(node)) for node in self._stages[0]]
        return visits

    def _shares(self, head: Numbers, tail: Numbers) -> tuple[Numbers, Numbers]:
        """What one visit takes of each node's time, rests included, and of its slots beside `held`.

        A slot is free again only when the backward pass that frees it has ended, since the processor is busy until then. Nor are a
        node's slots taken all at once: their first forward passes follow each other, and so do their last backward passes. What
        that and heads and tails cost is spread over the visits that there may be, since a node that nobody visits does not pay.
        """
        case, origins = self._case, self._stages[0]
        visits = self._most_visits()
        work = self._forward + self._backward + 2 * case.gap_s + (head + tail) / visits
        work[origins] += self._loss[origins] + case.gap_first_s
        slots = np.array(case.slots_per_node, dtype=float)
        pass_s = self._forward + self._backward + 2 * case.gap_s
        pass_s[origins] += case.gap_first_s - case.gap_s
        ends = slots * (head + tail) + slots * (slots - 1) / 2 * pass_s
        slot_share: Numbers = ends / np.maximum(visits, slots) + self._backward + case.gap_s
        return work, slot_share

    def _ends(self, link: Numbers) -> tuple[Numbers, Numbers]:
        """The least time before a node's first task, and after its last one."""
        origins = self._stages[0]
        others = np.setdiff1d(np.arange(len(link)), origins)
        head, tail = np.zeros(len(link)), np.zeros(len(link))
        if not len(others):
            return head, tail
        away = link + np.where(np.eye(len(link), dtype=bool), np.inf, 0.0)
        least = float(away.min())
        forward, backward = self._forward, self._backward
        direct = (forward[origins][:, None] + link[np.ix_(origins, others)]).min(axis=0)
        detour = forward[origins].min() + least + (forward[others][:, None] + away[np.ix_(others, others)]).min(axis=0)
        head[others] = np.minimum(direct, detour)
        direct = (link[np.ix_(others, origins)] + backward[origins]).min(axis=1)
        detour = (away[np.ix_(others, others)] + backward[others]).min(axis=1) + least + backward[origins].min()
        tail[others] = np.minimum(direct, detour)
        return head, tail

    def _trips(self) -> Iterator[float]:
        """Lower bounds on the unhindered time of any path, one per order."""
        forward_and_back = self._forward + self._backward
        for order in self._orders:
            origins = self._stages[order[0]]
            yield float(self._least_rest(order)[0] + forward_and_back[origins].min())
