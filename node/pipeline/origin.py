"""Our own microbatches, at stage 0: sending them through the pipeline, and telling everybody when they have ended."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable

from torch import Tensor

from node.pipeline.handover import Handover, StageTerms
from node.pipeline.ledger import Held, Ledger, MicrobatchLostError, key_of
from node.pipeline.messages import Notice, Task
from node.pipeline.visits import Visits
from protocol.ids import PeerId

__all__ = ["Origin"]

FAREWELL_S = 1.0


class Origin:
    """What a peer of stage 0 does besides serving.

    Args:
        terms: what was agreed on.
        ledger: what is here.
        visits: those to ourselves, where every microbatch begins and ends.
    """

    def __init__(self, terms: StageTerms, *, ledger: Ledger, visits: Visits, handover: Handover) -> None:
        self._terms, self._ledger, self._visits, self._handover = terms, ledger, visits, handover
        self._announcing: set[asyncio.Task[None]] = set()

    async def train(self, tokens: Tensor, *, path: list[PeerId], priority: int = 0) -> float:
        """Send one microbatch through the pipeline and back.

        Args:
            tokens: int64 [B, T + 1].
            path: the peers to visit; the first is ourselves.
            priority: lower goes first, everywhere.

        Returns:
            Its loss, once its gradients are counted here and wherever it went.

        Raises:
            MicrobatchLostError: it did not come back. What its gradient added before it was lost stays counted there.
        """
        task = Task(
            run=self._terms.run,
            iteration=self._ledger.iteration,
            microbatch=secrets.randbits(62),
            kind="forward",
            path=list(path),
            position=0,
            priority=priority,
            payload_bytes=self._terms.payload_bytes,
        )
        finished: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._ledger.take(key_of(task), Held(path=task.path, finished=finished))
        try:
            async with asyncio.TaskGroup() as tasks:
                visit = tasks.create_task(
                    self._visits.outward(task, tokens, asyncio.get_running_loop().create_future())
                )
                await asyncio.wait((visit, finished), return_when=asyncio.FIRST_COMPLETED)
                if finished.done():
                    visit.cancel()  # it need not be passed on any more
            if not finished.done() and not visit.result():
                raise MicrobatchLostError("nobody could take it")
            return await finished
        finally:
            if self._ledger.iteration == task.iteration:
                self._ledger.forget(key_of(task))

    def announce_end(self, peers: Iterable[PeerId]) -> asyncio.Task[None]:
        """Tell everybody that none of our microbatches of this iteration is under way; returns the task that does it."""
        notice = Notice(run=self._terms.run, iteration=self._ledger.iteration, kind="end")
        self._ledger.note_end(self._terms.peer, self._ledger.iteration)
        announcing = asyncio.get_running_loop().create_task(self._announce(list(peers), notice))
        self._announcing.add(announcing)
        announcing.add_done_callback(self._announcing.discard)
        return announcing

    async def close(self) -> None:
        """Until everybody has been told, or a moment has passed."""
        announcing = [*self._announcing]
        if announcing:
            await asyncio.wait(announcing, timeout=FAREWELL_S)
        for each in announcing:
            each.cancel()

    async def _announce(self, peers: list[PeerId], notice: Notice) -> None:
        async with asyncio.TaskGroup() as tasks:
            for peer in peers:
                if peer != self._terms.peer:
                    tasks.create_task(self._handover.notify(peer, notice))
