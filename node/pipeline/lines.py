"""Lines that several transfers share: each node's uplink and downlink, in the event simulation of node/pipeline/replay.py.

All transfers under way go on at once. Each has a speed, and speeds are max-min fair, as TCP's are nearly: the line on which
a transfer would get least gives all of its transfers the same part; what these leave free on their other lines is shared by
the rest in the same way. A transfer alone on both of its lines takes the longer of `uplink_s` and `downlink_s`. What `link_s`
has beyond that, the way itself, comes after it and holds no line.

Its twin is in node/pipeline/replay_lines.h: the same operations in the same order, so that both agree to the last digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heappop, heappush

from node.pipeline.case import Case

__all__ = ["Lines"]

_NOTHING = 1e-9
"""Of a payload: what is left when a transfer has ended, as far as rounding tells."""
_UNKNOWN = -1.0

Event = tuple[float, int, int]
"""Time, microbatch, and the index of its task that arrives; ~index where the transfer to it begins."""


@dataclass(slots=True)
class _Transfer:
    """`left` of a payload, of which `speed` go per second."""

    sender: int
    receiver: int
    number: int
    index: int
    left: float = 1.0
    speed: float = _UNKNOWN


class Lines:
    """The lines of one iteration."""

    def __init__(self, case: Case) -> None:
        self._link_s, nodes = case.link_s, range(case.num_nodes)
        self._up_s, self._down_s = case.uplink_s, case.downlink_s
        self._up_full = [1.0 / held_s if held_s > 0.0 else math.inf for held_s in case.uplink_s]
        self._down_full = [1.0 / held_s if held_s > 0.0 else math.inf for held_s in case.downlink_s]
        self._up, self._down = [0.0 for _ in nodes], [0.0 for _ in nodes]
        self._num_up, self._num_down = [0 for _ in nodes], [0 for _ in nodes]
        self._transfers: list[_Transfer] = []
        self._now = 0.0
        self._next_s, self._next = math.inf, 0

    def carry(self, events: list[Event], nodes: list[tuple[int, ...]]) -> None:
        """Begin and end all transfers that do so before anything else happens.

        Args:
            events: a heap, from which transfers that begin are taken and to which arrivals are added.
            nodes: of every microbatch's tasks.
        """
        while True:
            if self._transfers and (not events or self._next_s <= events[0][0]):
                self._end(events)
            elif events and events[0][2] < 0:
                now, number, index = heappop(events)
                self._begin(events, now, number, ~index, nodes[number])
            else:
                return

    def _begin(self, events: list[Event], now: float, number: int, index: int, nodes: tuple[int, ...]) -> None:
        sender, receiver = nodes[index - 1], nodes[index]
        if self._held_s(sender, receiver) <= 0.0:
            heappush(events, (now + self._link_s[sender][receiver], number, index))
            return
        self._advance(now)
        self._transfers.append(_Transfer(sender, receiver, number, index))
        self._share()

    def _end(self, events: list[Event]) -> None:
        ended = self._transfers[self._next]
        self._advance(self._next_s)
        ended.left = 0.0  # whatever rounding says
        going = []
        for each in self._transfers:
            if each.left > _NOTHING:
                going.append(each)
                continue
            way_s = self._link_s[each.sender][each.receiver] - self._held_s(each.sender, each.receiver)
            heappush(events, (self._now + max(way_s, 0.0), each.number, each.index))
        self._transfers = going
        self._share()

    def _held_s(self, sender: int, receiver: int) -> float:
        return max(self._up_s[sender], self._down_s[receiver])

    def _advance(self, now: float) -> None:
        passed_s = now - self._now
        for each in self._transfers:
            each.left -= each.speed * passed_s
        self._now = now

    def _share(self) -> None:
        """Give every transfer its speed, and find the one that ends first."""
        up, down, num_up, num_down = self._up, self._down, self._num_up, self._num_down
        transfers = self._transfers
        for each in transfers:
            num_up[each.sender] = num_down[each.receiver] = 0
            up[each.sender], down[each.receiver] = self._up_full[each.sender], self._down_full[each.receiver]
            each.speed = _UNKNOWN
        for each in transfers:
            num_up[each.sender] += 1
            num_down[each.receiver] += 1
        num_left = len(transfers)
        while num_left:
            least, line, is_up = math.inf, -1, True
            for each in transfers:
                if each.speed == _UNKNOWN:
                    part = up[each.sender] / num_up[each.sender]
                    if part < least:
                        least, line, is_up = part, each.sender, True
                    part = down[each.receiver] / num_down[each.receiver]
                    if part < least:
                        least, line, is_up = part, each.receiver, False
            for each in transfers:
                if each.speed == _UNKNOWN and (each.sender if is_up else each.receiver) == line:
                    each.speed = least
                    up[each.sender] -= least
                    down[each.receiver] -= least
                    num_up[each.sender] -= 1
                    num_down[each.receiver] -= 1
                    num_left -= 1
        self._next_s = math.inf
        for place, each in enumerate(transfers):
            end_s = self._now + each.left / each.speed
            if end_s < self._next_s:
                self._next_s, self._next = end_s, place
