"""The iterations of one stage peer: microbatches out and back, then one inner step, for all peers at about the same time.

    origin (stage 0)     send all its microbatches ─► wait for them ─► tell everybody that they ended
    everybody            serve ─► until every origin has said so, or the deadline ─► inner step ─► next iteration

There is no coordinator. An origin that has been silent in two iterations running is not waited for, until it is heard again; a
peer that one origin cannot reach keeps in step by the others. An origin that is new is waited for at once. A peer that finds the
others further on (it was frozen, or has just joined) goes on with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from node.compute import Compute
from node.pipeline.ledger import MicrobatchLostError
from node.pipeline.routing import StageMap
from node.pipeline.server import StageServer
from node.pipeline.trainer import StageTrainer
from protocol.ids import PeerId

__all__ = ["IterationStats", "Iterations", "Way"]

Way = tuple[list[PeerId], int]
"""Whom a microbatch visits, ourselves first, and its priority."""
PATIENCE = 2
"""Iterations in which an origin may be silent before nobody waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationStats:
    """One iteration of one peer.

    Args:
        number: which one.
        loss: mean over our own microbatches that came back, nats per token; NaN without any.
        tokens: that our inner step is the mean over; 0 for no step.
        returned: of our own microbatches.
        lost: of our own microbatches.
        is_complete: whether every origin said that it ended; else the deadline ended it.
        ended_s: from its beginning until that; our inner step comes after.
    """

    number: int
    loss: float
    tokens: int
    returned: int = 0
    lost: int = 0
    is_complete: bool = True
    ended_s: float = 0.0


class Iterations:
    """Runs them.

    Args:
        stages: who holds what; kept up to date by the caller.
        choose_paths: given an iteration and how many microbatches we start in it, their paths and priorities.
        timeout_s: an iteration never takes longer.
        least_tokens: with fewer there is no inner step.
    """

    def __init__(
        self,
        *,
        peer: PeerId,
        server: StageServer,
        trainer: StageTrainer,
        compute: Compute,
        stages: StageMap,
        choose_paths: Callable[[int, int], Sequence[Way]],
        timeout_s: float,
        least_tokens: int = 1,
    ) -> None:
        self._peer, self._server, self._trainer, self._compute = peer, server, trainer, compute
        self._stages, self._timeout_s, self._least_tokens = stages, timeout_s, least_tokens
        self._choose_paths = choose_paths
        self._silent: dict[PeerId, int] = {}

    async def run(self, batches: Sequence[Tensor] = ()) -> IterationStats:
        """One iteration.

        Args:
            batches: token ids [B, T + 1] of our own microbatches; only a peer of stage 0 has any.

        Cancellation leaves the weights between two steps.
        """
        number = self._server.iteration
        losses: list[float] = []
        is_complete = False
        started_s = asyncio.get_running_loop().time()
        self._stages.begin_iteration()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                if self._trainer.stage == 0:
                    await self._send(number, batches, losses)
                is_complete = await self._server.wait_for_end(self.awaited)
        ended_s = asyncio.get_running_loop().time() - started_s
        self._listen()
        self._server.close_iteration()
        tokens = await self._compute.run(self._trainer.step, least_tokens=self._least_tokens)
        self._server.next_iteration()
        return IterationStats(
            number=number,
            loss=sum(losses) / len(losses) if losses else math.nan,
            tokens=tokens,
            returned=len(losses),
            lost=len(batches) - len(losses),
            is_complete=is_complete,
            ended_s=ended_s,
        )

    async def _send(self, number: int, batches: Sequence[Tensor], losses: list[float]) -> None:
        """All our microbatches at once; the turnstiles sort them. Those that are not back at the deadline are lost."""

        async def send(tokens: Tensor, path: list[PeerId], priority: int) -> None:
            with contextlib.suppress(MicrobatchLostError):
                losses.append(await self._server.origin.train(tokens, path=path, priority=priority))

        try:
            async with asyncio.TaskGroup() as tasks:
                ways = self._choose_paths(number, len(batches))
                for tokens, (path, priority) in zip(batches, ways, strict=True):
                    tasks.create_task(send(tokens, path, priority))
        finally:
            # Not waited for: one peer that does not answer would hold up all.
            self._server.origin.announce_end(self._stages.everybody)

    def awaited(self) -> list[PeerId]:
        """The origins for whose end the present iteration waits."""
        return [
            peer
            for peer in self._stages.holders(0)
            if self._silent.get(peer, 0) < PATIENCE or self._server.has_ended(peer)
        ]

    def _listen(self) -> None:
        """Count the iterations in which origins were silent."""
        for peer in self._stages.holders(0):
            self._silent[peer] = 0 if self._server.has_told_us(peer) else self._silent.get(peer, 0) + 1
