"""One volunteer's peer, from its command to its farewell.

Data are fetched, a role is taken, and then the peer works in it (node/membership.py), in a pipeline perhaps in several roles one
after the other. Stopping finishes the step and the write in progress, says goodbye in the directory, and returns a summary;
whatever kills the process instead costs at most a round.
"""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass
from pathlib import Path

import psutil

from model.data import Tokens
from model.tokenizer import Tokenizer
from node.compute import Compute
from node.consolidation import Consolidated
from node.dataset import BatchSource, open_source
from node.events import EventLog
from node.membership import Membership
from node.options import PeerOptions
from node.progress import Progress
from node.role import Role
from node.service import Service
from node.training_state import TrainingState
from protocol.blobs import BlobStore
from protocol.errors import TransportError
from protocol.identity import Identity
from protocol.publication import SignedManifest
from protocol.transport import Transport

__all__ = ["Peer", "PeerOptions", "Summary"]

DATA_TIMEOUT_S = 120.0


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
    stage: int | None = None
    """Which stage of a pipeline was held last; None for a whole replica."""
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
        self._folder = folder
        self._role = Role(self.manifest, identity=identity, service=self.service, progress=self.progress, folder=folder)
        self._membership: Membership | None = None
        self._has_stopped = False

    @property
    def trainer(self) -> TrainingState | None:
        """What is trained now; None before that."""
        return None if self._membership is None else self._membership.trainer

    def stop(self) -> None:
        """Leave after the step in progress; may be called at any time from the event loop."""
        self._has_stopped = True
        if self._membership is not None:
            self._membership.stop()

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
            before: int | None = None
            membership: Membership | None
            while True:
                membership = self._membership = Membership(
                    self.manifest,
                    role=self._role,
                    service=self.service,
                    identity=self._identity,
                    compute=self._compute,
                    progress=self.progress,
                    options=self._options,
                    folder=self._folder,
                )
                if self._has_stopped:
                    membership.stop()
                try:
                    await membership.run(source, heldout)
                except TransportError:
                    if before is None:
                        raise
                    target, before = before, None  # nobody gives a state there: back to where we have one
                else:
                    if membership.next_stage is None:
                        break
                    target, before = membership.next_stage, self._role.stage
                self._membership = membership = None
                gc.collect()  # the old stage must be gone before there is room for the new one
                await self._role.move(target)
                self._tell_stage()
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
            stage=self._role.stage,
            consolidated=None if self._membership is None else self._membership.consolidated,
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
        self._tell_stage()

    def _tell_stage(self) -> None:
        if self._role.stage is not None:
            self._events.emit("stage", stage=self._role.stage, stages=self.manifest.pipeline.stages)
