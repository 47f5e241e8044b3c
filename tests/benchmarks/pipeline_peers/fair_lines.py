"""The event simulation once more, with lines as TCP shares them: all transfers on a line at once, each with its part of it.

node/pipeline/replay.py lets transfers through one after the other, in the order in which they were asked for, and counts an
iteration up to its last backward pass. Here a transfer gets the lesser of its parts of both lines, and the iteration ends as it
does in the executor: the origin has asked whether the last backward pass counts, and every peer has heard of the end. What the two
differ by is what the planner's model leaves out; this one is too slow to plan with.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from node.pipeline.case import Case
from node.pipeline.plan import Plan
from node.pipeline.replay import FORWARD, Route, route

__all__ = ["replay_fairly"]

_NOTHING = 1e-9


@dataclass(slots=True)
class _Transfer:
    """`left` of a payload on its way; then the microbatch's task `index` arrives."""

    left: float
    sender: int
    receiver: int
    number: int
    index: int


def replay_fairly(case: Case, plan: Plan) -> float:
    """Seconds of the iteration, of a plan that ends and whose nodes take backward passes first."""
    return _Replay(case, plan).run()


class _Replay:
    def __init__(self, case: Case, plan: Plan) -> None:
        self._case, self._plan = case, plan
        self._routes: list[Route] = [route(case, each.path) for each in plan.microbatches]
        self._slots = list(case.slots_per_node)
        self._busy = [False] * case.num_nodes
        self._forward: list[list[tuple[float, int, int, int]]] = [[] for _ in range(case.num_nodes)]
        self._others: list[list[tuple[float, int, int, int]]] = [[] for _ in range(case.num_nodes)]
        self._events: list[tuple[float, int, bool, int, int]] = []
        """Time, tie, whether a task ends or arrives, microbatch, index of its task."""
        self._transfers: list[_Transfer] = []
        self._ties = count()
        self._now = 0.0
        self._ends: dict[int, float] = {}

    def run(self) -> float:
        for number in range(len(self._routes)):
            self._expect(0.0, number, 0)
        while self._events or self._transfers:
            self._advance()
            for transfer in [each for each in self._transfers if each.left < _NOTHING]:
                self._transfers.remove(transfer)
                latency_s = self._latency_s(transfer.sender, transfer.receiver)
                self._expect(self._now + latency_s, transfer.number, transfer.index)
            while self._events and self._events[0][0] <= self._now:
                _, _, is_end, number, index = heappop(self._events)
                (self._end if is_end else self._arrive)(number, index)
        nodes = range(self._case.num_nodes)
        return max(self._ends.values()) + max(self._latency_s(a, b) for a in nodes for b in nodes if a != b)

    def _latency_s(self, sender: int, receiver: int) -> float:
        case = self._case
        return case.link_s[sender][receiver] - max(case.uplink_s[sender], case.downlink_s[receiver])

    def _expect(self, at_s: float, number: int, index: int, *, is_end: bool = False) -> None:
        heappush(self._events, (at_s, next(self._ties), is_end, number, index))

    def _advance(self) -> None:
        """To the next event, or to the end of the next transfer."""
        sending = Counter(each.sender for each in self._transfers)
        receiving = Counter(each.receiver for each in self._transfers)
        per_s = [
            min(
                1.0 / self._case.uplink_s[each.sender] / sending[each.sender],
                1.0 / self._case.downlink_s[each.receiver] / receiving[each.receiver],
            )
            for each in self._transfers
        ]
        ends = [self._now + each.left / rate for each, rate in zip(self._transfers, per_s, strict=True)]
        until_s = min([*ends, self._events[0][0]] if self._events else ends)
        for each, rate in zip(self._transfers, per_s, strict=True):
            each.left -= rate * (until_s - self._now)
        self._now = until_s

    def _arrive(self, number: int, index: int) -> None:
        node, kind = self._routes[number][index][:2]
        waiting = (self._plan.microbatches[number].priority, next(self._ties), number, index)
        heappush(self._forward[node] if kind == FORWARD else self._others[node], waiting)
        self._start(node)

    def _start(self, node: int) -> None:
        if self._busy[node]:
            return
        if self._others[node]:
            _, _, number, index = heappop(self._others[node])
        elif self._forward[node] and self._slots[node]:
            _, _, number, index = heappop(self._forward[node])
        else:
            return
        _, kind, duration_s, *_ = self._routes[number][index]
        self._slots[node] += kind - 1
        self._busy[node] = True
        self._expect(self._now + duration_s, number, index, is_end=True)

    def _end(self, number: int, index: int) -> None:
        steps = self._routes[number]
        node = steps[index][0]
        self._busy[node] = False
        if index + 1 == len(steps):
            self._ends[number] = self._now + 2.0 * self._latency_s(node, self._plan.microbatches[number].path[1])
        elif steps[index + 1][0] == node:
            self._expect(self._now, number, index + 1)
        else:
            self._transfers.append(_Transfer(1.0, node, steps[index + 1][0], number, index + 1))
        self._start(node)
