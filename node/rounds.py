"""The life of a trainer: rounds of inner steps, with the last round's exchange running underneath.

    steps of round r ──► pack Δ_r ──► steps of round r+1 ─────────────────────► pack Δ_{r+1} ──► …
                             └─ exchange of round r with one partner ─┐
                                                       apply between two steps

There is no coordinator and no common clock; node/round_clock.py says which round a peer is in. Training never waits for an
exchange: while one is under way the round takes more steps, and at its deadline the peer steps alone. A peer that met nobody
ends its next round with the others, to be there when they look for partners. Nor does training wait for the next
round's tokens or the directory, which node/preparation.py brings beforehand: between two rounds there is only the packing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from averaging.allreduce import GroupAverager
from averaging.averager import Averager
from averaging.early import EarlySlow
from averaging.update import Update
from model.batches import RoundBatches
from node.averaging_round import averaging_rounds, group_summary
from node.compute import Compute
from node.dataset import BatchSource
from node.events import EventLog
from node.inner_steps import InnerSteps
from node.preparation import LEAD_S, Preparation
from node.progress import Progress
from node.round_clock import MAX_STRETCH, RoundClock
from node.trainer import StepStats
from node.training_state import TrainingState
from protocol.directory import SwarmView
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.records import PeerRecord

__all__ = ["RoundLoop", "RoundSettings", "sequences_for"]

T = TypeVar("T")

DEADLINE_SHARE = 1.5
"""An overlapped exchange may take this share of a round: peers end theirs up to a whole round apart."""
LEAST_SHARE = 0.5
"""A round that ends with the others' has this share of its steps at least."""
RESIZE_LIMIT = 2.0
"""Largest change of the batch from one round to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSettings:
    """What the owner of this peer sets.

    Attributes:
        sequences: sequences per step to begin with.
        adapt: change them between rounds so that a round keeps taking the run's target time.
        most: upper bound of the sequences per step that this machine's memory sets; 0 for none.
        max_rounds: stop after this many rounds of this session; 0 for as long as the run lasts.
    """

    sequences: int
    adapt: bool = True
    most: int = 0
    max_rounds: int = 0


class RoundLoop:
    """Trains until the run ends, `max_rounds` are done, or it is stopped.

    Args:
        steps: how the trainer steps.
        group: for runs that average by the group all-reduce.
        after_round: awaited with the number of each finished round (checkpoints, snapshots); it should return at once.
        announce: publishes this peer's record, so that others know its new round at once.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        trainer: TrainingState,
        steps: InnerSteps,
        compute: Compute,
        source: BatchSource,
        averager: Averager,
        group: GroupAverager | None = None,
        directory: SwarmView,
        progress: Progress,
        events: EventLog,
        settings: RoundSettings,
        after_round: Callable[[int], Awaitable[None]],
        announce: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._manifest, self._trainer, self._compute, self._source = manifest, trainer, compute, source
        self._steps = steps
        self._averaging = averaging_rounds(manifest, averager, group)
        self._early = averager.early
        self._directory, self._progress = directory, progress
        self._events, self._settings = events, settings
        self._after_round, self._announce = after_round, announce
        self._clock = RoundClock(total_rounds=manifest.sync.total_rounds)
        self._stopping = asyncio.Event()
        self._round_s = manifest.sync.round_target_s
        self._planned_steps = manifest.sync.inner_steps
        self._met_nobody = False
        self._ahead: asyncio.Task[None] | None = None
        self._resumed_cursor: int | None = None
        self.batches: RoundBatches | None = None
        progress.sequences_per_step = settings.sequences

    def stop(self) -> None:
        """Ask the loop to end after the step in progress."""
        self._stopping.set()
        self._steps.stop()

    def resume_cursor(self, cursor: int | None) -> None:
        """Start the first round's batches where a checkpoint left them."""
        self._resumed_cursor = cursor

    async def run(self) -> None:
        """Train. Cancellation leaves the trainer between two calls, with a whole state."""
        total = self._manifest.sync.total_rounds
        self._sync_progress()
        pending: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as tasks:
            preparation = Preparation(
                tasks,
                source=self._source if self._steps.reads_data else None,
                directory=self._directory,
                run=self._manifest.run_id,
                peer=self._progress.peer,
            )
            while not self._stopping.is_set() and not self._finished(total):
                preparation.begin(self._trainer.round)
                await self._inner_steps(preparation, pending)
                if self._stopping.is_set():
                    break
                pending = await self._exchange(tasks, preparation)
            preparation.cancel()
            for task in (pending, self._ahead):
                if task is not None:
                    task.cancel()

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

    def _finished(self, total: int) -> bool:
        done = self._settings.max_rounds and self._progress.rounds_done >= self._settings.max_rounds
        return bool(done or (total and self._trainer.round >= total))

    def _sync_progress(self) -> None:
        self._progress.round, self._progress.step = self._trainer.round, self._trainer.step_in_round
        self._progress.tokens = self._trainer.tokens

    # ---- inner steps

    async def _inner_steps(self, preparation: Preparation, pending: asyncio.Task[None] | None) -> None:
        """The rest of the current round, and the end of the exchange of the last one, which applies between two steps."""
        if self._steps.reads_data and not await self._read_batches(preparation):
            return
        loop = asyncio.get_running_loop()
        started, first = loop.time(), self._trainer.step_in_round
        self._planned_steps = self._manifest.sync.inner_steps
        while self._has_more_steps(pending) and not self._stopping.is_set():
            self._keep_up(pending)
            self._prepare_end(preparation)
            stats, seconds = await self._steps.step(self.batches)
            self._count_step(stats, seconds)
        steps = self._trainer.step_in_round - first
        if steps:
            self._round_s = loop.time() - started
            self._resize(self._round_s * self._manifest.sync.inner_steps / steps)
        if pending is not None:
            await self._unless_stopped(pending)

    async def _read_batches(self, preparation: Preparation) -> bool:
        """Those of the current round; False if the owner leaves first."""
        batches = await self._unless_stopped(preparation.batches(self._trainer.round))
        if batches is None:
            return False
        self.batches = batches
        if self._resumed_cursor is not None:
            self.batches.cursor, self._resumed_cursor = self._resumed_cursor, None
        return True

    def _has_more_steps(self, pending: asyncio.Task[None] | None) -> bool:
        """Whether the round goes on: it has its planned steps, and rather than wait it takes more of them, while the last
        round's exchange is under way or the others are behind."""
        common = self._steps.round_now
        if common is not None:
            return common <= self._trainer.round
        done = self._trainer.step_in_round
        if done < self._planned_steps:
            return True
        if done >= MAX_STRETCH * self._manifest.sync.inner_steps:
            return False
        self._observe()
        return self._clock.is_ahead(self._trainer.round) or (pending is not None and not pending.done())

    def _keep_up(self, pending: asyncio.Task[None] | None) -> None:
        """Make the step to come the round's last one when the others have ended theirs and we met nobody last time."""
        done, planned = self._trainer.step_in_round, self._manifest.sync.inner_steps
        if not self._met_nobody or done + 1 < LEAST_SHARE * planned or (pending is not None and not pending.done()):
            return
        self._observe()
        if self._clock.is_behind(self._trainer.round):
            self._planned_steps = min(self._planned_steps, done + 1)

    def _prepare_end(self, preparation: Preparation) -> None:
        """Start preparing for the next round when the step to come is the round's last, or close to it."""
        left, eta_s = self._planned_steps - self._trainer.step_in_round, self._progress.eta_s
        if left <= 1 or (eta_s is not None and eta_s <= LEAD_S):
            preparation.end(self._trainer.round, steps_left=left)

    def _count_step(self, stats: StepStats, seconds: float) -> None:
        now_s = asyncio.get_running_loop().time()
        self._progress.count_step(loss=stats.loss, tokens=stats.tokens, seconds=seconds, now_s=now_s)
        loss = round(stats.loss, 4) if math.isfinite(stats.loss) else None
        self._events.emit("step", round=self._trainer.round, step=self._progress.step, loss=loss)

    def _resize(self, round_s: float) -> None:
        """Fit the batch of the next round to the target time."""
        if self._settings.adapt:
            wanted = sequences_for(self._manifest, now=self._progress.sequences_per_step, round_s=round_s)
            self._progress.sequences_per_step = min(wanted, self._settings.most or wanted)

    # ---- the exchange

    async def _exchange(self, tasks: asyncio.TaskGroup, preparation: Preparation) -> asyncio.Task[None] | None:
        """Close the round and start its exchange; without overlap, or at the end of the run, wait for it."""
        next_round = self._next_round()
        divergences = self._trainer.num_divergences
        update = await self._compute.run(self._trainer.end_round, next_round)
        if self._trainer.num_divergences > divergences:
            self._events.emit("diverged", round=update.round)
        self._progress.rounds_done += 1
        self._sync_progress()
        sync = self._manifest.sync
        last = self._finished(sync.total_rounds)
        overlapped = sync.overlap and not last
        limit_s = sync.exchange_timeout_s
        if overlapped:
            limit_s = min(limit_s, DEADLINE_SHARE * max(self._round_s, sync.round_target_s))
        tasks.create_task(self._announce())
        if self._ahead is not None:
            self._ahead.cancel()
        exchange = tasks.create_task(self._settle(update, limit_s, preparation, tasks))
        if overlapped:
            return exchange
        await self._unless_stopped(exchange)
        return None

    def _next_round(self) -> int:
        """One more than the round just finished, or the swarm's if that is further on."""
        self._observe()
        own, common = self._trainer.round, self._steps.round_now
        following = self._clock.next_round(own) if common is None else max(common, own + 1)
        if following > own + 1:
            self._events.emit("round_skipped", own=own + 1, swarm=following)
        return following

    def _observe(self) -> None:
        self._clock.observe(self._trainers(), asyncio.get_running_loop().time())

    def _trainers(self) -> dict[PeerId, PeerRecord]:
        """Those whose rounds matter here: the live trainers, and nobody in a run that never averages."""
        if self._manifest.sync.algorithm == "local":
            return {}
        records = self._directory.peers
        return {peer: r for peer, r in records.items() if r.role == "trainer" and r.state == "training"}

    async def _settle(self, update: Update, limit_s: float, preparation: Preparation, tasks: asyncio.TaskGroup) -> None:
        """Exchange with a partner, take the outer step, and measure where that leaves us."""
        deadline_s, finished = asyncio.get_running_loop().time() + limit_s, update.round
        await preparation.looked(timeout_s=limit_s)
        # All of them: a record may be rounds old, and whom the round window leaves out is said in the exchange itself.
        averaged = await self._averaging.average(update, candidates=list(self._trainers()), deadline_s=deadline_s)
        self._met_nobody = not averaged.partners and averaged.group_mean is None
        outcome = await self._compute.run(self._trainer.apply, averaged.partners, averaged.group_mean)
        if self._early is not None:
            self._ahead = tasks.create_task(self._look_ahead(self._early, finished + 1))
        for note in self._averaging.conclude(averaged, outcome, round=finished):
            self._progress.count_exchange(note)
            self._events.emit("exchange", **note.model_dump())
        if averaged.group is not None:
            self._events.emit("group_round", round=finished, **group_summary(averaged.group))
        loss = await self._steps.measure(last=self._finished(self._manifest.sync.total_rounds))
        if loss is not None:
            self._progress.count_validation(loss, finished + 1)
            share = round(self._progress.training_share or 0.0, 4)
            self._events.emit("validation", round=finished + 1, loss=round(loss, 4), training_share=share)
        await self._after_round(finished)

    async def _look_ahead(self, early: EarlySlow, round: int) -> None:
        """Send and fetch what can travel before that round's exchange; cancelled when that begins."""
        data = await self._compute.run(self._trainer.replica.slow_ahead, round)
        await early.go_ahead(round, data, candidates=self._trainers())


def sequences_for(manifest: Manifest, *, now: int, round_s: float) -> int:
    """Sequences per step with which a round takes the target time, given that with `now` it takes `round_s`."""
    ratio = manifest.sync.round_target_s / max(round_s, 1e-6)
    ratio = min(max(ratio, 1 / RESIZE_LIMIT), RESIZE_LIMIT)
    wanted = round(now * ratio)
    if abs(wanted - now) <= 0.1 * now:  # do not chase noise
        wanted = now
    return min(max(wanted, manifest.inner.min_sequences), manifest.inner.max_sequences)
