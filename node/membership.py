"""A peer at work in one role: a whole replica, or one stage of a pipeline, from its first state to its last.

State is fetched while the machine is measured; then rounds (node/rounds.py) until the run ends, the owner stops the peer, or, in
a pipeline, another stage needs it more; at the run's end the peers average until they hold one model (node/consolidation.py).
After every round a checkpoint goes to disk in the background; what is given to others of the state, and taken from them, is in
node/shared_state.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from pathlib import Path

import psutil
import torch

from model.data import Tokens
from node.averaging_round import averagers_of
from node.bench import choose_sequences, choose_threads, most_sequences
from node.checkpoints import Checkpoints
from node.compute import Compute
from node.consolidation import Consolidated, Consolidator
from node.dataset import BatchSource
from node.options import PeerOptions
from node.pipeline.archive import StageArchive, kept_copies
from node.pipeline.balance import Balance
from node.pipeline.final_state import hand_over
from node.pipeline.rebuild import StageRebuilder
from node.pipeline.steps import PipelineSteps
from node.pipeline.trainer import StageTrainer
from node.progress import Progress
from node.role import Role
from node.rounds import RoundLoop, RoundSettings
from node.service import Service, Watcher
from node.shared_state import SharedState
from node.trainer import Trainer
from node.training_state import TrainingState
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.records import PeerRecord

__all__ = ["Membership"]


class Membership:
    """One stretch of work in one role; `run` once.

    Args:
        role: which; it has been taken.
        folder: of the run in this home; None keeps nothing.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        role: Role,
        service: Service,
        identity: Identity,
        compute: Compute,
        progress: Progress,
        options: PeerOptions,
        folder: Path | None,
    ) -> None:
        self.manifest = manifest
        self._role, self._service, self._identity, self._compute = role, service, identity, compute
        self._transport, self._store, self._events = service.transport, service.store, service.events
        self._progress, self._options, self._folder = progress, options, folder
        self._checkpoints = Checkpoints(role.checkpoints, compute=compute, events=self._events)
        self.trainer: TrainingState | None = None
        self.consolidated: Consolidated | None = None
        self.next_stage: int | None = None
        """The stage to go to, when this ended because another one needs us more."""
        self._loop: RoundLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._shared: SharedState | None = None
        self._balance = Balance(manifest, peer=identity.peer_id, stage=role.stage or 0, fitting=role.fitting)
        self._has_stopped = False
        self._most = 0

    def stop(self) -> None:
        """Leave after the step in progress."""
        self._has_stopped = True
        if self._loop is not None:
            self._loop.stop()
        if self._ending is not None:
            self._ending.cancel()

    async def run(self, source: BatchSource, heldout: Tokens) -> None:
        """Work until the run ends or `stop`, or until `next_stage` is set.

        Raises:
            UserError: something the owner must mend (damaged checkpoint, wrong manifest).
            TransportError: the swarm cannot supply what is needed to start.
        """
        trainer = await self._compute.run(self._role.trainer, heldout, device=self._options.device)
        self.trainer = trainer
        self._shared = SharedState(
            trainer,
            role=self._role,
            service=self._service,
            identity=self._identity,
            compute=self._compute,
            progress=self._progress,
            folder=self._folder,
        )
        measuring = asyncio.ensure_future(self._measure(trainer))
        try:  # no task group: it would wrap what the caller looks for
            cursor = await self._shared.start(
                self._checkpoints, rebuilder=self._rebuilder(trainer) if isinstance(trainer, StageTrainer) else None
            )
            sequences = await measuring
        finally:
            measuring.cancel()
        loss = await self._compute.run(trainer.evaluate)
        if loss is not None:
            self._progress.count_validation(loss, trainer.round)
            self._events.emit("validation", round=trainer.round, loss=round(loss, 4))
        await self._train(trainer, source, heldout, sequences, cursor)

    async def _measure(self, trainer: TrainingState) -> int:
        if self._options.threads:
            await self._compute.run(torch.set_num_threads, self._options.threads)
        if isinstance(trainer, StageTrainer):
            self._progress.forward_s = await self._compute.run(trainer.measure_forward)
            return self.manifest.pipeline.microbatch_sequences
        if self._options.sequences:
            return self._options.sequences
        assert isinstance(trainer, Trainer)
        threads = self._options.threads or await self._compute.run(choose_threads, trainer)
        self._most = most_sequences(self.manifest, free_bytes=psutil.virtual_memory().available)
        sequences = await self._compute.run(choose_sequences, trainer, most=self._most)
        self._events.emit("measured", sequences_per_step=sequences, threads=threads)
        return sequences

    # ---- training

    async def _train(
        self, trainer: TrainingState, source: BatchSource, heldout: Tokens, sequences: int, cursor: int | None
    ) -> None:
        averager, group = averagers_of(trainer, transport=self._transport, identity=self._identity)
        settings = RoundSettings(
            sequences=sequences,
            adapt=not self._options.sequences and self._role.stage is None,
            most=self._most,
            max_rounds=self._options.max_rounds,
        )
        steps = self._role.steps(trainer, heldout=heldout, compute=self._compute, events=self._events)
        watchers: list[Watcher] = [self._keep_copies]
        if isinstance(steps, PipelineSteps):
            watchers += [*steps.watchers, self._archive().look, functools.partial(self._mind_the_balance, steps)]
        with self._checkpoints.writing(), self._service.watching(watchers):
            self._loop = loop = RoundLoop(
                self.manifest,
                trainer=trainer,
                steps=steps,
                compute=self._compute,
                source=source,
                averager=averager,
                group=group,
                directory=self._role.view,
                progress=self._progress,
                events=self._events,
                settings=settings,
                after_round=self._after_round,
                announce=self._service.beat,
            )
            loop.resume_cursor(cursor)
            if self._has_stopped:
                loop.stop()
            self._progress.state = "training"
            self._events.emit(
                "training",
                round=trainer.round,
                step=trainer.step_in_round,
                sequences=sequences,
                stage=self._role.stage,
            )
            try:
                async with averager, group or contextlib.nullcontext():
                    await self._service.beat()  # others may choose this peer from now on
                    await loop.run()
                if self.next_stage is None:
                    await self._consolidate(trainer)
            finally:
                self._progress.state = "leaving" if self.next_stage is None else "joining"
                if isinstance(steps, PipelineSteps):
                    await steps.close()
                await self._save(final=True)
                if self.next_stage not in (None, self._role.stage) and self._shared is not None:
                    self._shared.let_go()

    async def _after_round(self, round: int) -> None:
        assert self._shared is not None
        await self._shared.after_round(round, self._other_trainers())
        await self._save(final=False)

    async def _consolidate(self, trainer: TrainingState) -> None:
        """At the end of the run: come to one model with the others."""
        consolidator = Consolidator(
            trainer,
            compute=self._compute,
            transport=self._transport,
            identity=self._identity,
            directory=self._role.view,
            progress=self._progress,
            events=self._events,
            announce=self._service.beat,
        )
        if self._has_stopped:
            return
        self._ending = asyncio.ensure_future(self._end_run(consolidator))
        try:
            await self._ending
        except asyncio.CancelledError:
            if not self._has_stopped:
                raise  # else the owner leaves, and what was averaged so far is a model, too

    async def _end_run(self, consolidator: Consolidator) -> None:
        if consolidator.is_due:
            self.consolidated = await consolidator.run()
        total = self.manifest.sync.total_rounds
        assert self._shared is not None
        assert self.trainer is not None
        if self._role.stage is not None and total and self._progress.round >= total:
            await hand_over(
                self._role.stage,
                manifest=self.manifest,
                num_parameters=self.trainer.flat.theta.numel(),
                service=self._service,
                publish=functools.partial(self._shared.publish_in_turn, total, self._other_trainers()),
            )

    async def _keep_copies(self) -> None:
        assert self._shared is not None
        await self._shared.keep_copies(self._other_trainers())

    def _other_trainers(self) -> dict[PeerId, PeerRecord]:
        records = self._role.view.peers
        return {p: r for p, r in records.items() if r.role == "trainer" and r.state == "training"}

    async def _save(self, *, final: bool) -> None:
        assert self.trainer is not None
        batches = self._loop.batches if self._loop is not None else None
        await self._checkpoints.save(self.trainer, batches, final=final)

    # ---- a pipeline's stages

    def _archive(self) -> StageArchive:
        """Copies of the next stage's state, should that lose all its replicas."""
        assert self._role.stage is not None
        assert self._shared is not None
        archive = StageArchive(
            self.manifest,
            stages=[(self._role.stage + 1) % self.manifest.pipeline.stages],
            directory=self._service.directory,
            transport=self._transport,
            store=self._store,
            folder=self._folder,
            events=self._events,
        )
        archive.drop_others(in_use={ref.root for ref in self._shared.held})
        return archive

    def _rebuilder(self, trainer: StageTrainer) -> StageRebuilder:
        return StageRebuilder(
            trainer,
            directory=self._service.directory,
            transport=self._transport,
            store=self._store,
            compute=self._compute,
            events=self._events,
            own=None if self._folder is None else kept_copies(self._folder).get(trainer.stage),
        )

    async def _mind_the_balance(self, steps: PipelineSteps) -> None:
        """Go where another stage needs us more, once the present iteration is over."""
        target = self._balance.look(self._service.directory.neighbourhood, iteration=self._progress.iteration)
        if steps.is_left_behind:
            target = self._role.stage  # as if we joined anew
        if target is None or self._is_leaving():
            return
        self._events.emit("moving", stage=self._role.stage, to=target)
        self._progress.next_stage = target  # or all who stand in line would go while the iteration lasts
        await self._service.beat()
        await steps.end_of_iteration()
        if self._is_leaving():  # the run has ended meanwhile, or its owner goes
            self._progress.next_stage = None
            return
        self.next_stage = target
        if self._loop is not None:
            self._loop.stop()

    def _is_leaving(self) -> bool:
        return self.next_stage is not None or self._has_stopped or self._ending is not None
