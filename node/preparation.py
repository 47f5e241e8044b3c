"""What the next round needs, brought while this one trains: its tokens, and a fresh look at the directory.

Nothing trains between two rounds, so nothing there may wait for the network or the disk. The shard of the next round is fetched
from this round's start on; shortly before the round's end its tokens are read and the directory is looked at, late enough to
see which round the others are in now. What is not there in time goes on in the background, and the round ends without it.
"""

from __future__ import annotations

import asyncio

from model.batches import RoundBatches
from node.dataset import BatchSource
from node.mixing import foreign_bucket
from protocol.directory import SwarmView
from protocol.ids import PeerId, RunId

__all__ = ["LEAD_S", "Preparation"]

LEAD_S = 2.0
"""So long before a round's end it is prepared for: a look at the directory over the internet takes about a second."""
LOOK_AGAIN_S = 1.0
"""Between two looks at the directory while a round is being stretched."""


class Preparation:
    """The background tasks of one round loop.

    Args:
        tasks: group to run them in; `cancel` ends them.
        source: of batches; None for rounds that need none.
        run: whose directory it is.
        peer: ourselves.
    """

    def __init__(
        self, tasks: asyncio.TaskGroup, *, source: BatchSource | None, directory: SwarmView, run: RunId, peer: PeerId
    ) -> None:
        self._tasks, self._source, self._directory, self._run, self._peer = tasks, source, directory, run, peer
        self._prefetch: asyncio.Task[None] | None = None
        self._look: asyncio.Task[None] | None = None
        self._looked_at_s = 0.0
        self._round: int | None = None
        self._batches: asyncio.Task[RoundBatches] | None = None

    def begin(self, round: int) -> None:
        """`round` starts: fetch what the one after it reads. A slow fetch goes on beside the rounds; nobody waits for it."""
        if self._source is not None and (self._prefetch is None or self._prefetch.done()):
            self._prefetch = self._tasks.create_task(self._source.prefetch(round + 1))

    def end(self, round: int, *, steps_left: int) -> None:
        """`round` is about to end; may be called before every further step."""
        now_s = asyncio.get_running_loop().time()
        if self._look is None or (self._look.done() and now_s - self._looked_at_s >= LOOK_AGAIN_S):
            self._looked_at_s = now_s
            self._look = self._tasks.create_task(self._look_around(round))
        # As late as can be while the shard is on its way: reading without it means training on another one.
        if self._source is not None and (steps_left <= 1 or self._prefetch is None or self._prefetch.done()):
            self._read(round + 1)

    def batches(self, round: int) -> asyncio.Task[RoundBatches]:
        """The batches of `round`, read already unless the swarm's number skipped the round they were read for."""
        reading = self._read(round)
        self._batches = None
        return reading

    async def looked(self, *, timeout_s: float) -> None:
        """Wait until the look under way has ended, or for `timeout_s`."""
        if self._look is not None:
            await asyncio.wait((self._look,), timeout=timeout_s)

    def cancel(self) -> None:
        """End everything that is still under way."""
        for task in (self._prefetch, self._look, self._batches):
            if task is not None:
                task.cancel()

    def _read(self, round: int) -> asyncio.Task[RoundBatches]:
        if self._batches is None or self._round != round:
            if self._batches is not None:
                self._batches.cancel()
            assert self._source is not None, "no rounds without data ask for it"
            self._round, self._batches = round, self._tasks.create_task(self._source.batches(round))
        return self._batches

    async def _look_around(self, round: int) -> None:
        await self._directory.refresh(extra=foreign_bucket(self._run, round, self._peer))
