"""Inner steps through the pipeline: what the round loop asks for a step, an iteration gives.

One object per stage peer, from its first task to its last: it serves, keeps the map of stages up to date from the directory,
and runs one iteration per step. Rounds, exchanges with the replicas of its stage, snapshots and checkpoints are those of any
peer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from statistics import median_low
from typing import Any

from model.batches import RoundBatches
from model.data import Tokens
from node.compute import Compute
from node.events import EventLog
from node.inner_steps import InnerSteps
from node.pipeline.activations import ActivationCodec
from node.pipeline.handover import StageTerms
from node.pipeline.inference import Inference, heldout_microbatches
from node.pipeline.iterations import Iterations, Way
from node.pipeline.ledger import MAX_LEAD
from node.pipeline.links import Links
from node.pipeline.messages import Task
from node.pipeline.plan_book import PlanBook
from node.pipeline.planning import Planning
from node.pipeline.replay import BACKWARD, FORWARD, LOSS
from node.pipeline.routing import Replica, StageMap
from node.pipeline.server import StageServer
from node.pipeline.trainer import StageTrainer
from node.progress import Progress
from node.trainer import StepStats
from protocol.directory import Directory
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.records import MAX_ROUND
from protocol.transport import Transport
from protocol.violations import Violations

__all__ = ["PipelineSteps"]

LOOK_AGAIN_S = 0.5
SETTLING_S = 7.0
"""Two heartbeats and a little: after that everybody has read a newcomer's record."""


class PipelineSteps(InnerSteps):
    """Steps of one stage's replica.

    Args:
        trainer: of our stage.
        heldout: the held-out set [T].
        identity: signs plans.
        directory: of all peers, whatever their stage.
        codec: of activations; left out, the run's.
    """

    def __init__(
        self,
        trainer: StageTrainer,
        *,
        heldout: Tokens,
        identity: Identity,
        transport: Transport,
        compute: Compute,
        directory: Directory,
        progress: Progress,
        events: EventLog,
        codec: ActivationCodec | None = None,
    ) -> None:
        manifest = trainer.manifest
        spec, inner = manifest.pipeline, manifest.inner
        self.reads_data = trainer.stage == 0
        self._trainer, self._directory, self._progress, self._events = trainer, directory, progress, events
        self._peer, self._spec, self._inner_steps = transport.peer_id, spec, manifest.sync.inner_steps
        shape = (spec.microbatch_sequences, inner.sequence_tokens, manifest.model.hidden_size)
        codec = codec or ActivationCodec(spec.codec, shape)
        self._stages = StageMap(num_stages=spec.stages, path_length=spec.path_length)
        self.violations = Violations()
        self._links = Links(transport, payload_bytes=codec.num_bytes)
        is_origin = trainer.stage == 0
        self._plans = PlanBook(
            manifest,
            payload_bytes=codec.num_bytes if is_origin else 0,
            transport=transport,
            events=events,
            violations=self.violations,
        )
        self._planning = Planning(
            manifest, book=self._plans, payload_bytes=codec.num_bytes, identity=identity, compute=compute
        )
        self._server = StageServer(
            StageTerms(
                run=manifest.run_id,
                peer=self._peer,
                payload_bytes=codec.num_bytes,
                slots=spec.slots,
                per_origin=spec.microbatches,
                hop_timeout_s=spec.hop_timeout_s,
            ),
            transport=transport,
            compute=compute,
            worker=trainer.worker,
            codec=codec,
            router=self._stages,
            links=self._links,
            violations=self.violations,
            on_failure=self._tell_failure,
        )
        self._iterations = Iterations(
            peer=self._peer,
            server=self._server,
            trainer=trainer,
            compute=compute,
            stages=self._stages,
            choose_paths=self._choose_paths,
            timeout_s=spec.iteration_timeout_s,
        )
        self._inference = Inference(
            manifest.run_id,
            transport=transport,
            compute=compute,
            worker=trainer.worker,
            codec=codec,
            stages=self._stages,
            timeout_s=spec.hop_timeout_s,
        )
        self._heldout = (
            heldout_microbatches(heldout, sequences=spec.microbatch_sequences, sequence_tokens=inner.sequence_tokens)
            if is_origin
            else []
        )
        self._iteration: asyncio.Task[object] | None = None
        self._has_stopped = False
        self._seen_at_s: dict[tuple[PeerId, int], float] = {}
        self._known_at_s = 0.0

    def enter(self) -> None:
        """Begin with the iteration that the swarm is in, as far as its records tell."""
        self.look()
        records = self._directory.neighbours.values()
        iterations = [r.iteration for r in records if r.stage is not None and r.state == "training"]
        if any(iterations):
            self._known_at_s = asyncio.get_running_loop().time() + SETTLING_S
        own = self._trainer.round * self._inner_steps + self._trainer.step_in_round
        last = self._trainer.total_steps or MAX_ROUND
        common = min(median_low(iterations), last) if iterations else own
        # Who has moved here is not sent back by old records.
        self._server.begin_at(max(common, self._progress.iteration))
        self._trainer.enter(self._server.iteration)
        self._progress.iteration = self._server.iteration

    @property
    def round_now(self) -> int | None:
        return self._server.iteration // self._inner_steps

    def look(self) -> None:
        """Take over from the directory who holds what, and how far the origins are: a notice may have been lost."""
        now_s = asyncio.get_running_loop().time()
        peers, seen = {}, {}
        for peer, record in self._directory.neighbours.items():
            if record.stage is not None and record.state == "training":
                holds = peer, record.stage
                seen[holds] = self._seen_at_s.get(holds, now_s)
                is_new = now_s - seen[holds] < SETTLING_S
                peers[peer] = Replica(stage=record.stage, forward_s=record.forward_s, is_new=is_new)
                if record.stage == 0 and record.iteration > 0:
                    self._server.note_end(peer, record.iteration - 1)
        peers[self._peer] = Replica(stage=self._trainer.stage, forward_s=self._progress.forward_s)
        self._seen_at_s = seen
        self._stages.update(peers)
        self._server.look_again()

    @property
    def watchers(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        """To be run after every look at the directory; one may take long without holding up the others."""
        return [self.after_heartbeat, self._measure_link, self._see_to_plan]

    async def after_heartbeat(self) -> None:
        """Take over what the directory shows."""
        self.look()

    async def _measure_link(self) -> None:
        await self._links.probe_next(self._stages.everybody)
        self._progress.links = self._links.notes()

    async def _see_to_plan(self) -> None:
        """With the records of all live peers of the pipeline, ourselves included."""
        records = self._directory.neighbourhood.items()
        at_work = {peer: r for peer, r in records if r.stage is not None and r.state == "training"}
        total = self._trainer.total_steps
        if not total or self._server.iteration < total:
            await self._planning.look(at_work, self._server.iteration)
        self._progress.plan = self._plans.number

    async def step(self, batches: RoundBatches | None) -> tuple[StepStats, float]:
        await self._wait_for_company()
        microbatches = []
        if batches is not None and not self._is_unknown():
            microbatches = [batches.next(self._spec.microbatch_sequences) for _ in range(self._spec.microbatches)]
        plan = self._plans.number
        started_s = asyncio.get_running_loop().time()
        self._iteration = running = asyncio.create_task(self._iterations.run(microbatches))
        if self._has_stopped:
            running.cancel()
        try:
            stats = await running
        except asyncio.CancelledError:
            if not self._has_stopped:
                running.cancel()
                raise
            return StepStats(loss=float("nan"), tokens=0), 0.0
        finally:
            self._iteration = None
        seconds = asyncio.get_running_loop().time() - started_s
        if stats.is_complete:
            self._planning.note_iteration(plan, stats.ended_s)
        self._tell_pace()
        if self.round_now == self._trainer.round:  # also after an iteration without a step, or several that were missed
            self._trainer.enter(self._server.iteration)
        self._events.emit(
            "iteration",
            number=stats.number,
            tokens=stats.tokens,
            returned=stats.returned,
            lost=stats.lost,
            complete=stats.is_complete,
            seconds=round(seconds, 3),
        )
        return StepStats(loss=stats.loss, tokens=stats.tokens), seconds

    async def _wait_for_company(self) -> None:
        """Until somebody holds stage 0, and so many other stages are held that there is a path. To train what is left of a model
        would do it harm."""
        self.look()
        while not self._has_stopped and not (self._iterations.awaited() and self._stages.has_paths):
            await asyncio.sleep(LOOK_AGAIN_S)
            self.look()

    def _is_unknown(self) -> bool:
        """Whether others would refuse our microbatches, since they have not read yet that we are one of them. Those who come first
        wait for nobody."""
        now_s = asyncio.get_running_loop().time()
        return now_s < self._known_at_s and len(self._stages.holders(0)) > 1

    def _choose_paths(self, iteration: int, count: int) -> list[Way]:
        """By the plan, mended where the swarm has changed; what it does not provide for goes the greedy way."""
        plan = self._plans.newest
        planned = [] if plan is None else plan.paths_from(self._peer)
        ways = []
        for number in range(count):
            lot = f"{self._peer}/{iteration}/{number}"
            if number < len(planned):
                path, stages, priority = planned[number]
                ways.append((self._stages.mended(path, stages, lot=lot), priority))
            else:
                ways.append((self._stages.path(self._peer, lot=lot), number))
        return ways

    def _tell_pace(self) -> None:
        """What the record says of our iterations and our speed."""
        progress, pace = self._progress, self._server.pace
        progress.iteration = self._server.iteration
        progress.forward_s = pace.get(FORWARD, progress.forward_s)
        progress.backward_s, progress.loss_s = pace.get(BACKWARD, 0.0), pace.get(LOSS, 0.0)

    def _tell_failure(self, task: Task, reason: str) -> None:
        self._events.emit(
            "hop_failed",
            iteration=task.iteration,
            microbatch=task.microbatch,
            kind=task.kind,
            peer=task.path[task.position],
            reason=reason,
        )

    async def measure(self, *, last: bool) -> float | None:
        """Through the whole pipeline, by one origin per round."""
        if not self._heldout or not self._inference.is_our_turn(self._trainer.round):
            return None
        return await self._inference.loss(self._heldout)

    def stop(self) -> None:
        self._has_stopped = True
        if self._iteration is not None:
            self._iteration.cancel()

    @property
    def is_left_behind(self) -> bool:
        """Whether most origins are so much further that nothing they tell is believed: we have slept, say."""
        records = self._directory.neighbours.values()
        iterations = [r.iteration for r in records if r.stage == 0 and r.state == "training"]
        return bool(iterations) and median_low(iterations) > self._server.iteration + MAX_LEAD

    async def end_of_iteration(self) -> None:
        """Until no iteration is under way."""
        if self._iteration is not None:
            await asyncio.wait([self._iteration])

    async def close(self) -> None:
        """Take nothing more in: our stage is in other hands from now on, and what it took of our memory is needed for another."""
        self._inference.close()
        await self._server.close()
