"""One volunteer's peer, from its first state to its farewell.

The order of events: data and state are fetched while the machine is measured; then rounds (node/rounds.py) until the run ends or
the owner stops it; at the run's end the peers average until they hold one model (node/consolidation.py). After every round a
checkpoint goes to disk in the background, and a peer whose weights have strayed from everybody's takes the swarm's. Stopping
finishes the step and the write in progress, says goodbye in the directory, and returns a summary; whatever kills the process
instead costs at most a round.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from model.data import Tokens
from model.tokenizer import Tokenizer
from node.averaging_round import averagers_of
from node.bench import choose_sequences, choose_threads, most_sequences
from node.catchup import StateFetcher, find_start
from node.checkpoints import Checkpoints
from node.compute import Compute
from node.consolidation import Consolidated, Consolidator
from node.dataset import BatchSource, open_source
from node.events import EventLog
from node.pipeline.trainer import StageTrainer
from node.progress import Progress
from node.role import Role
from node.rounds import RoundLoop, RoundSettings
from node.service import Service
from node.snapshots import SnapshotKeeper
from node.trainer import Trainer
from node.training_state import TrainingState
from protocol.blobs import BlobStore
from protocol.errors import TransportError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.publication import SignedManifest
from protocol.records import PeerRecord, SnapshotRef
from protocol.transport import Transport

__all__ = ["Peer", "PeerOptions", "Summary"]

DATA_TIMEOUT_S = 120.0
HANDOVER_S = 12.0
"""A few heartbeats: one for the record, one for the copies and their votes, one for the archive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """What the owner of a peer chooses.

    Attributes:
        name: shown on the status page.
        http: host and port of a status page served here, or None.
        local_data: folder of the volunteer's own text, for a run of kind `local`.
        sequences: fixed sequences per step; 0 measures the machine and adapts.
        threads: torch's threads; 0 takes one or all, whichever is faster.
        max_rounds: leave after so many rounds; 0 stays as long as the run lasts.
        device: torch device.
        memory_bytes: training may take so much memory; 0 for what is free.
        age_s: how long the command has been running already; counts towards the time to the first step.
    """

    name: str = ""
    http: tuple[str, int] | None = None
    local_data: Path | None = None
    sequences: int = 0
    threads: int = 0
    max_rounds: int = 0
    device: str = "cpu"
    memory_bytes: int = 0
    age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a peer contributed in this session."""

    rounds: int
    tokens: int
    exchanges_ok: int
    exchanges_failed: int
    sent_bytes: int
    received_bytes: int
    val_loss_start: float | None
    val_loss_end: float | None
    time_to_first_step_s: float | None
    finished: bool
    consolidated: Consolidated | None = None
    """How the peers came to one model at the run's end; None before it."""


class Peer:
    """A trainer of one run.

    Args:
        folder: where checkpoints and caches are kept; None keeps nothing (simulated swarms).
    """

    def __init__(
        self,
        signed: SignedManifest,
        *,
        identity: Identity,
        transport: Transport,
        store: BlobStore,
        compute: Compute,
        events: EventLog,
        folder: Path | None,
        options: PeerOptions,
    ) -> None:
        self.manifest = signed.manifest
        self._identity, self._transport, self._store, self._compute = identity, transport, store, compute
        self._events, self._options = events, options
        self.progress = Progress(
            run=self.manifest.run_id,
            peer=identity.peer_id,
            name=options.name,
            inner_steps=self.manifest.sync.inner_steps,
            traffic=transport.traffic,
        )
        self.service = Service(
            signed,
            identity=identity,
            transport=transport,
            store=store,
            events=events,
            record=self.progress.record,
            folder=folder,
            http=options.http,
        )
        self.trainer: TrainingState | None = None
        self._loop: RoundLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._consolidated: Consolidated | None = None
        self._fetcher: StateFetcher | None = None
        self._stopped = False
        self._most = 0
        self._role = Role(self.manifest, identity=identity, service=self.service, progress=self.progress, folder=folder)
        self._keeper: SnapshotKeeper | None = None

    def stop(self) -> None:
        """Leave after the step in progress; may be called at any time from the event loop."""
        self._stopped = True
        if self._loop is not None:
            self._loop.stop()
        if self._ending is not None:
            self._ending.cancel()

    async def run(self) -> Summary:
        """Take part in the run.

        Raises:
            UserError: something the owner must mend (data folder, damaged checkpoint, wrong manifest).
            TransportError: the swarm cannot supply what is needed to start.
        """
        self.progress.began_s = asyncio.get_running_loop().time() - self._options.age_s
        async with self.service.running():
            source, heldout, _ = await self._open_data()
            await self._take_role()
            trainer = await self._compute.run(self._role.trainer, heldout, device=self._options.device)
            self.trainer = trainer
            async with asyncio.TaskGroup() as tasks:
                measured = tasks.create_task(self._measure(trainer))
                cursor = await self._starting_state(trainer)
            sequences = measured.result()
            loss = await self._compute.run(trainer.evaluate)
            if loss is not None:
                self.progress.count_validation(loss, trainer.round)
                self._events.emit("validation", round=trainer.round, loss=round(loss, 4))
            await self._train(trainer, source, sequences, cursor)
        return self.summary()

    def summary(self) -> Summary:
        """What was contributed so far."""
        progress, total = self.progress, self.manifest.sync.total_rounds
        return Summary(
            rounds=progress.rounds_done,
            tokens=progress.session_tokens,
            exchanges_ok=progress.exchanges_ok,
            exchanges_failed=progress.exchanges_failed,
            sent_bytes=progress.traffic.sent_bytes,
            received_bytes=progress.traffic.received_bytes,
            val_loss_start=progress.first_val_loss,
            val_loss_end=progress.val_loss,
            time_to_first_step_s=progress.time_to_first_step_s,
            finished=bool(total and progress.round >= total),
            consolidated=self._consolidated,
        )

    # ---- before the first step

    async def _open_data(self) -> tuple[BatchSource, Tokens, Tokenizer]:
        deadline_s = asyncio.get_running_loop().time() + DATA_TIMEOUT_S
        while True:
            try:
                return await open_source(
                    self.manifest,
                    peer=self._identity.peer_id,
                    store=self._store,
                    transport=self._transport,
                    donors=self.service.donors,
                    events=self._events,
                    local_data=self._options.local_data,
                )
            except TransportError as error:
                if asyncio.get_running_loop().time() > deadline_s:
                    raise
                self._events.emit("waiting_for_data", reason=str(error))
                await asyncio.sleep(1.0)
                await self.service.beat()

    async def _take_role(self) -> None:
        free_bytes = psutil.virtual_memory().available
        limit_bytes = self._options.memory_bytes or free_bytes
        await self._role.take(memory_bytes=min(free_bytes, limit_bytes))
        self._checkpoints = Checkpoints(self._role.checkpoints, compute=self._compute, events=self._events)
        if self._role.stage is not None:
            self._events.emit("stage", stage=self._role.stage, stages=self.manifest.pipeline.stages)

    async def _measure(self, trainer: TrainingState) -> int:
        if self._options.threads:
            await self._compute.run(torch.set_num_threads, self._options.threads)
        if isinstance(trainer, StageTrainer):
            self.progress.forward_s = await self._compute.run(trainer.measure_forward)
            return self.manifest.pipeline.microbatch_sequences
        if self._options.sequences:
            return self._options.sequences
        assert isinstance(trainer, Trainer)
        threads = self._options.threads or await self._compute.run(choose_threads, trainer)
        self._most = most_sequences(self.manifest, free_bytes=psutil.virtual_memory().available)
        sequences = await self._compute.run(choose_sequences, trainer, most=self._most)
        self._events.emit("measured", sequences_per_step=sequences, threads=threads)
        return sequences

    async def _starting_state(self, trainer: TrainingState) -> int | None:
        """Find it, and return the data cursor to resume from, if any."""
        self._fetcher = StateFetcher(
            trainer=trainer,
            compute=self._compute,
            store=self._store,
            transport=self._transport,
            directory=self._role.view,
            events=self._events,
        )
        self._keeper = SnapshotKeeper(
            run=self.manifest.run_id,
            peer=self._identity.peer_id,
            every_rounds=self.manifest.sync.snapshot_rounds,
            trainer=trainer,
            compute=self._compute,
            store=self._store,
            transport=self._transport,
            events=self._events,
            publish=self._show_snapshots,
            own_loss=self.progress.val_loss_after,
        )
        start = await find_start(trainer, fetcher=self._fetcher, checkpoints=self._checkpoints, events=self._events)
        if start.adopted is not None:
            self._keeper.adopt(start.adopted)
        return start.cursor

    def _show_snapshots(self, held: list[SnapshotRef]) -> None:
        self.progress.snapshots = held

    # ---- training

    async def _train(self, trainer: TrainingState, source: BatchSource, sequences: int, cursor: int | None) -> None:
        averager, group = averagers_of(trainer, transport=self._transport, identity=self._identity)
        settings = RoundSettings(
            sequences=sequences,
            adapt=not self._options.sequences and self._role.stage is None,
            most=self._most,
            max_rounds=self._options.max_rounds,
        )
        with self._checkpoints.writing():
            self._loop = loop = RoundLoop(
                self.manifest,
                trainer=trainer,
                steps=self._role.steps(trainer, compute=self._compute, events=self._events),
                compute=self._compute,
                source=source,
                averager=averager,
                group=group,
                directory=self._role.view,
                progress=self.progress,
                events=self._events,
                settings=settings,
                after_round=self._after_round,
                announce=self.service.beat,
            )
            loop.resume_cursor(cursor)
            if self._stopped:
                loop.stop()
            self.progress.state = "training"
            self._events.emit("training", round=trainer.round, step=trainer.step_in_round, sequences=sequences)
            self.service.on_heartbeat(self._keep_copies)
            try:
                async with averager, group or contextlib.nullcontext():
                    await self.service.beat()  # others may choose this peer from now on
                    await loop.run()
                await self._consolidate(trainer)
            finally:
                self.progress.state = "leaving"
                await self._save(final=True)

    async def _after_round(self, round: int) -> None:
        assert self._keeper is not None
        if self.trainer is not None and self.trainer.replica.admission.is_astray:
            await self._return_to_the_swarm(round)
        await self._keeper.after_round(round, self._other_trainers())
        await self._save(final=False)

    async def _return_to_the_swarm(self, round: int) -> None:
        assert self._fetcher is not None
        assert self._keeper is not None
        self._events.emit("astray", round=round)
        adopted = await self._fetcher.refetch()
        if adopted is not None:
            self._keeper.adopt(adopted)

    async def _consolidate(self, trainer: TrainingState) -> None:
        """At the end of the run: come to one model with the others."""
        consolidator = Consolidator(
            trainer,
            compute=self._compute,
            transport=self._transport,
            identity=self._identity,
            directory=self._role.view,
            progress=self.progress,
            events=self._events,
            announce=self.service.beat,
        )
        if self._stopped:
            return
        self._ending = asyncio.ensure_future(self._end_run(consolidator))
        try:
            await self._ending
        except asyncio.CancelledError:
            if not self._stopped:
                raise  # else the owner leaves, and what was averaged so far is a model, too

    async def _end_run(self, consolidator: Consolidator) -> None:
        if consolidator.is_due:
            self._consolidated = await consolidator.run()
        if self._role.stage is not None and self.summary().finished:
            await self._hand_over()

    async def _hand_over(self) -> None:
        """Publish the stage's final state, and stay until others have had the time to fetch it: nobody else holds it."""
        assert self._keeper is not None
        self._events.emit("handing_over", stage=self._role.stage, seconds=HANDOVER_S)
        await self._keeper.publish_in_turn(self.manifest.sync.total_rounds, self._other_trainers())
        await self.service.beat()
        await asyncio.sleep(HANDOVER_S)

    async def _keep_copies(self) -> None:
        assert self._keeper is not None
        await self._keeper.keep_copies(self._other_trainers())

    def _other_trainers(self) -> dict[PeerId, PeerRecord]:
        records = self._role.view.peers
        return {p: r for p, r in records.items() if r.role == "trainer" and r.state == "training"}

    async def _save(self, *, final: bool) -> None:
        assert self.trainer is not None
        batches = self._loop.batches if self._loop is not None else None
        await self._checkpoints.save(self.trainer, batches, final=final)
