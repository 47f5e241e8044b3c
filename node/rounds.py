"""The life of a trainer: rounds of inner steps, with the last round's exchange running underneath.

    steps of round r ──► pack Δ_r ──► steps of round r+1 ─────────────────────► pack Δ_{r+1} ──► …
                             └─ exchange of round r with one partner ─┐
                                                       apply between two steps

There is no coordinator and no common clock. A peer that fell behind takes the swarm's round number as its own (rounds are
labels; Δ is weighted by tokens), so peers of any speed stay within reach of each other. An exchange that has not ended when
the next round has is abandoned: the peer steps alone, and training never waits longer than the exchange's deadline.
"""

from __future__ import annotations

import asyncio
import hashlib
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from averaging.averager import Averager, ExchangeResult
from averaging.replica import Outcome
from averaging.update import Update
from model.batches import RoundBatches
from node.compute import Compute
from node.dataset import BatchSource
from node.events import EventLog
from node.progress import Progress
from node.trainer import StepStats, Trainer
from protocol.directory import Directory
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.records import ExchangeNote

__all__ = ["RoundLoop", "RoundSettings", "sequences_for"]

T = TypeVar("T")

DEADLINE_SHARE = 0.9
"""An overlapped exchange may take this share of a round, so that it is over before the next one starts."""
RESIZE_LIMIT = 2.0
"""Largest change of the batch from one round to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSettings:
    """What the owner of this peer sets.

    Attributes:
        sequences: sequences per step to begin with.
        adapt: change them between rounds so that a round keeps taking the run's target time.
        max_rounds: stop after this many rounds of this session; 0 for as long as the run lasts.
    """

    sequences: int
    adapt: bool = True
    max_rounds: int = 0


class RoundLoop:
    """Trains until the run ends, `max_rounds` are done, or it is stopped.

    Args:
        after_round: awaited with the number of each finished round (checkpoints, snapshots); it should return at once.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        trainer: Trainer,
        compute: Compute,
        source: BatchSource,
        averager: Averager,
        directory: Directory,
        progress: Progress,
        events: EventLog,
        settings: RoundSettings,
        after_round: Callable[[int], Awaitable[None]],
    ) -> None:
        self._manifest, self._trainer, self._compute, self._source = manifest, trainer, compute, source
        self._averager, self._directory, self._progress = averager, directory, progress
        self._events, self._settings, self._after_round = events, settings, after_round
        self._stopping = asyncio.Event()
        self._round_s = manifest.sync.round_target_s
        self._resumed_cursor: int | None = None
        self.batches: RoundBatches | None = None
        progress.sequences_per_step = settings.sequences

    def stop(self) -> None:
        """Ask the loop to end after the step in progress."""
        self._stopping.set()

    def resume_cursor(self, cursor: int | None) -> None:
        """Start the first round's batches where a checkpoint left them."""
        self._resumed_cursor = cursor

    async def run(self) -> None:
        """Train. Cancellation leaves the trainer between two calls, with a whole state."""
        total = self._manifest.sync.total_rounds
        self._sync_progress()
        pending: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as tasks:
            while not self._stopping.is_set() and not self._finished(total):
                prefetch = tasks.create_task(self._prefetch())
                await self._inner_steps(tasks, pending)
                await self._unless_stopped(prefetch)
                if self._stopping.is_set():
                    break
                pending = await self._exchange(tasks)
            if pending is not None:
                pending.cancel()

    async def _unless_stopped(self, task: asyncio.Task[T]) -> T | None:
        """Wait for a task that depends on the network; None, and the task cancelled, when the owner leaves first."""
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if task.done():
            return task.result()
        task.cancel()
        return None

    async def _prefetch(self) -> None:
        await self._source.prefetch(self._trainer.round + 1)

    def _finished(self, total: int) -> bool:
        done = self._settings.max_rounds and self._progress.rounds_done >= self._settings.max_rounds
        return bool(done or (total and self._trainer.round >= total))

    def _sync_progress(self) -> None:
        self._progress.round, self._progress.step = self._trainer.round, self._trainer.step_in_round
        self._progress.tokens = self._trainer.tokens

    # ---- inner steps

    async def _inner_steps(self, tasks: asyncio.TaskGroup, pending: asyncio.Task[None] | None) -> None:
        """The rest of the current round, and the end of the exchange of the last one, which applies between two steps."""
        batches = await self._unless_stopped(tasks.create_task(self._source.batches(self._trainer.round)))
        if batches is None:
            return
        self.batches = batches
        if self._resumed_cursor is not None:
            self.batches.cursor, self._resumed_cursor = self._resumed_cursor, None
        loop = asyncio.get_running_loop()
        started, first = loop.time(), self._trainer.step_in_round
        while self._trainer.step_in_round < self._manifest.sync.inner_steps and not self._stopping.is_set():
            stats = await self._compute.run(self._trainer.step, batches, self._progress.sequences_per_step)
            self._count_step(stats)
        if pending is not None:
            await self._unless_stopped(pending)
        steps = self._trainer.step_in_round - first
        if steps:
            self._resize((loop.time() - started) * self._manifest.sync.inner_steps / steps)

    def _count_step(self, stats: StepStats) -> None:
        now_s = asyncio.get_running_loop().time()
        self._progress.count_step(loss=stats.loss, tokens=stats.tokens, seconds=stats.seconds, now_s=now_s)
        self._events.emit("step", round=self._trainer.round, step=self._progress.step, loss=round(stats.loss, 4))

    def _resize(self, round_s: float) -> None:
        """Fit the batch of the next round to the target time."""
        self._round_s = round_s
        if self._settings.adapt:
            self._progress.sequences_per_step = sequences_for(
                self._manifest, now=self._progress.sequences_per_step, round_s=round_s
            )

    # ---- the exchange

    async def _exchange(self, tasks: asyncio.TaskGroup) -> asyncio.Task[None] | None:
        """Close the round and start its exchange; without overlap, or at the end of the run, wait for it."""
        finished = self._trainer.round
        next_round = await self._next_round()
        divergences = self._trainer.num_divergences
        update = await self._compute.run(self._trainer.end_round, next_round)
        if self._trainer.num_divergences > divergences:
            self._events.emit("diverged", round=finished)
        self._progress.rounds_done += 1
        self._sync_progress()
        sync = self._manifest.sync
        last = self._finished(sync.total_rounds)
        overlapped = sync.overlap and not last
        limit_s = sync.exchange_timeout_s
        if overlapped:
            limit_s = min(limit_s, DEADLINE_SHARE * self._round_s)
        exchange = tasks.create_task(self._average(update, finished, limit_s))
        if overlapped:
            return exchange
        await self._unless_stopped(exchange)
        return None

    async def _next_round(self) -> int:
        """One more than the round just finished, or the swarm's if that is further on."""
        # In a large swarm this also reads the bucket that the round's lot names, so that peers of all buckets mix.
        lot = hashlib.sha256(f"{self._manifest.run_id}/bucket/{self._trainer.round}".encode()).digest()
        await self._directory.refresh(extra=lot)
        rounds = list(self._rounds_of_others().values())
        following = self._trainer.round + 1
        if rounds and (median := int(statistics.median_low(rounds))) > following:
            self._events.emit("round_skipped", own=following, swarm=median)
            following = median
        total = self._manifest.sync.total_rounds
        return min(following, total) if total else following

    def _rounds_of_others(self) -> dict[PeerId, int]:
        return {
            peer: record.round
            for peer, record in self._directory.peers.items()
            if record.role == "trainer" and record.state == "training"
        }

    async def _average(self, update: Update, finished: int, limit_s: float) -> None:
        """Exchange with a partner, take the outer step, and measure where that leaves us."""
        deadline_s = asyncio.get_running_loop().time() + limit_s
        reach = self._manifest.sync.max_lag_rounds + 1  # a record may be a few seconds old
        candidates = [peer for peer, round in self._rounds_of_others().items() if abs(round - finished) <= reach]
        algorithm = self._manifest.sync.algorithm
        if algorithm == "local":
            results = []
        elif algorithm == "diloco":
            results = await self._averager.exchange_all(update, candidates=candidates, deadline_s=deadline_s)
        else:
            results = [await self._averager.exchange(update, candidates=candidates, deadline_s=deadline_s)]
        outcome = await self._compute.run(self._trainer.apply, [r.remote for r in results if r.remote is not None])
        for result in results:
            self._note(result, outcome, finished)
        loss = await self._compute.run(self._trainer.evaluate)
        self._progress.count_validation(loss, finished + 1)
        self._events.emit("validation", round=finished + 1, loss=round(loss, 4))
        await self._after_round(finished)

    def _note(self, result: ExchangeResult, outcome: Outcome, finished: int) -> None:
        kind = outcome.verdicts[result.remote.peer].kind if result.remote is not None else result.outcome
        note = ExchangeNote(round=finished, partner=result.partner, outcome=kind, seconds=round(result.seconds, 3))
        self._progress.count_exchange(note)
        self._events.emit("exchange", **note.model_dump())


def sequences_for(manifest: Manifest, *, now: int, round_s: float) -> int:
    """Sequences per step with which a round takes the target time, given that with `now` it takes `round_s`."""
    ratio = manifest.sync.round_target_s / max(round_s, 1e-6)
    ratio = min(max(ratio, 1 / RESIZE_LIMIT), RESIZE_LIMIT)
    wanted = round(now * ratio)
    if abs(wanted - now) <= 0.1 * now:  # do not chase noise
        wanted = now
    return min(max(wanted, manifest.inner.min_sequences), manifest.inner.max_sequences)
