"""Who may use the processor next: one task at a time, the most urgent first, and forward passes only while a slot is free.

The same rule by which node/pipeline/replay.py predicts an iteration: loss and backward passes before forward passes, since they
free slots; then by the plan's priority; then by arrival. A slot is taken by a forward pass and given back when that
microbatch's backward pass begins, or when it is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from heapq import heappop, heappush
from itertools import count

from node.pipeline.replay import FORWARD

__all__ = ["Turnstile"]


class Turnstile:
    """The processor of one peer.

    Args:
        slots: microbatches that may be between their forward and their backward pass here.
    """

    def __init__(self, slots: int) -> None:
        self.free_slots = slots
        self._is_busy = False
        self._forward: list[tuple[int, int, asyncio.Future[None]]] = []
        self._others: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = count()

    @property
    def num_waiting(self) -> int:
        """Tasks that wait for their turn."""
        return len(self._forward) + len(self._others)

    @contextlib.asynccontextmanager
    async def turn(self, kind: int, priority: int) -> AsyncIterator[None]:
        """Wait for the processor, and hold it inside the block.

        A forward pass takes a slot, which stays taken after the block; cancelled while it waits, a task has taken nothing.
        """
        turn = asyncio.get_running_loop().create_future()
        queue = self._forward if kind == FORWARD else self._others
        heappush(queue, (priority, next(self._arrivals), turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():  # still in the queue, where `_admit` passes it over
                raise
            self._is_busy = False
            if kind == FORWARD:
                self.free_slots += 1
            self._admit()
            raise
        try:
            yield
        finally:
            self._is_busy = False
            self._admit()

    def give_back(self, num_slots: int = 1) -> None:
        """Microbatches have left without a backward pass, or begin theirs."""
        self.free_slots += num_slots
        self._admit()

    def _admit(self) -> None:
        while not self._is_busy:
            for queue in (self._others, self._forward):
                while queue and queue[0][2].done():  # cancelled while it waited
                    heappop(queue)
            if self._others:
                queue = self._others
            elif self._forward and self.free_slots > 0:
                queue, self.free_slots = self._forward, self.free_slots - 1
            else:
                return
            self._is_busy = True
            heappop(queue)[2].set_result(None)
