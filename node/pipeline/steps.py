"""Inner steps through the pipeline: what the round loop asks for a step, an iteration gives.

One object per stage peer, from its first task to its last: it serves, keeps the map of stages up to date from the directory,
and runs one iteration per step. Rounds, exchanges with the replicas of its stage, snapshots and checkpoints are those of any
peer.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from statistics import median_low

from model.batches import RoundBatches
from node.compute import Compute
from node.events import EventLog
from node.inner_steps import InnerSteps
from node.pipeline.activations import ActivationCodec
from node.pipeline.handover import StageTerms
from node.pipeline.iterations import Iterations
from node.pipeline.messages import Task
from node.pipeline.routing import Replica, StageMap
from node.pipeline.server import StageServer
from node.pipeline.trainer import StageTrainer
from node.progress import Progress
from node.trainer import StepStats
from protocol.directory import Directory
from protocol.ids import PeerId
from protocol.records import MAX_ROUND
from protocol.transport import Transport

__all__ = ["PipelineSteps"]

LOOK_AGAIN_S = 0.5


class PipelineSteps(InnerSteps):
    """Steps of one stage's replica.

    Args:
        trainer: of our stage.
        directory: of all peers, whatever their stage.
    """

    def __init__(
        self,
        trainer: StageTrainer,
        *,
        transport: Transport,
        compute: Compute,
        directory: Directory,
        progress: Progress,
        events: EventLog,
    ) -> None:
        manifest = trainer.manifest
        spec, inner = manifest.pipeline, manifest.inner
        self.reads_data = trainer.stage == 0
        self._trainer, self._directory, self._progress, self._events = trainer, directory, progress, events
        self._peer, self._spec, self._inner_steps = transport.peer_id, spec, manifest.sync.inner_steps
        shape = (spec.microbatch_sequences, inner.sequence_tokens, manifest.model.hidden_size)
        codec = ActivationCodec(spec.codec, shape)
        self._stages = StageMap(num_stages=spec.stages, path_length=spec.path_length)
        self.violations: Counter[PeerId] = Counter()
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
            violations=self.violations,
            on_failure=self._tell_failure,
        )
        self._iterations = Iterations(
            peer=self._peer,
            server=self._server,
            trainer=trainer,
            compute=compute,
            stages=self._stages,
            timeout_s=spec.iteration_timeout_s,
        )
        self._iteration: asyncio.Task[object] | None = None
        self._has_stopped = False

    def enter(self) -> None:
        """Begin with the iteration that the swarm is in, as far as its records tell."""
        self.look()
        records = self._directory.peers.values()
        iterations = [r.iteration for r in records if r.stage is not None and r.state == "training"]
        own = self._trainer.round * self._inner_steps + self._trainer.step_in_round
        last = self._trainer.total_steps or MAX_ROUND
        self._server.begin_at(min(median_low(iterations), last) if iterations else own)
        self._trainer.enter(self._server.iteration)
        self._progress.iteration = self._server.iteration

    @property
    def round_now(self) -> int | None:
        return self._server.iteration // self._inner_steps

    def look(self) -> None:
        """Take over from the directory who holds what, and how far the origins are: a notice may have been lost."""
        peers = {}
        for peer, record in self._directory.peers.items():
            if record.stage is not None and record.state == "training":
                peers[peer] = Replica(stage=record.stage, forward_s=record.forward_s)
                if record.stage == 0 and record.iteration > 0:
                    self._server.note_end(peer, record.iteration - 1)
        peers[self._peer] = Replica(stage=self._trainer.stage, forward_s=self._progress.forward_s)
        self._stages.update(peers)

    async def after_heartbeat(self) -> None:
        """The directory has been read."""
        self.look()

    async def step(self, batches: RoundBatches | None) -> tuple[StepStats, float]:
        await self._wait_for_company()
        microbatches = []
        if batches is not None:
            microbatches = [batches.next(self._spec.microbatch_sequences) for _ in range(self._spec.microbatches)]
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
        self._progress.iteration = self._server.iteration
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
        return None  # a stage alone has no loss

    def stop(self) -> None:
        self._has_stopped = True
        if self._iteration is not None:
            self._iteration.cancel()
