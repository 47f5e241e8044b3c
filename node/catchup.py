"""How a peer gets its starting state: its own checkpoint, the swarm's, or the run's initial weights.

1. Its own checkpoint, unless the swarm is more than MAX_RESUME_LAG rounds ahead.
2. A snapshot for which enough independent peers vote, fetched in pieces from all of them, and measured on the held-out set
   before it is used. The highest claimed round alone counts for nothing: a liar has one vote.
3. If nobody trains yet, the initial weights made from the manifest's seed; their hash was checked when the model was built.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import CheckpointError
from node.compute import Compute
from node.events import EventLog
from node.snapshots import max_snapshot_bytes
from node.trainer import Trainer
from protocol.blob_exchange import fetch_blob
from protocol.blobs import BlobStore
from protocol.directory import Directory
from protocol.errors import LlmNodeError, TransportError
from protocol.ids import BlobId, PeerId
from protocol.records import PeerRecord, SnapshotRef
from protocol.transport import Transport

__all__ = ["MAX_RESUME_LAG", "NUM_VOTES", "StateFetcher", "choose_snapshots"]

NUM_VOTES = 3
"""Peers that must vouch for a state; all live trainers when there are fewer."""
MAX_RESUME_LAG = 20
"""Rounds the swarm may be ahead of a checkpoint that is still resumed from."""
WAIT_FOR_STATE_S = 120.0
"""A joiner waits so long for a state that passes, when the swarm has begun; it never starts from scratch beside it."""
LOSS_MARGIN = 0.5
"""A state may be so much worse (nats per token) than what the trainers say of their own."""
LOOK_AGAIN_S = 0.5
NUM_LOOKS = 3
"""Looks at the directory before a joiner believes that nobody trains yet."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot and the peers that vouch for it."""

    ref: SnapshotRef
    voters: tuple[PeerId, ...]


def choose_snapshots(trainers: Mapping[PeerId, PeerRecord]) -> list[Candidate]:
    """Snapshots that a joiner may try, best first: those with NUM_VOTES votes, or all when there are fewer trainers, the newest
    of them first; then those that more than half of so few trainers vouch for.

    What fewer peers claim is never tried, however new it is: that is what a liar, or a few of them, can make up. Nor is a
    state from a round that the swarm has not reached.
    """
    votes: dict[SnapshotRef, list[PeerId]] = {}
    for peer, record in trainers.items():
        for ref in set(record.snapshots):
            votes.setdefault(ref, []).append(peer)
    quorum, majority = min(NUM_VOTES, len(trainers)), len(trainers) // 2 + 1
    newest = _median([record.round for record in trainers.values()])
    candidates = [Candidate(ref, tuple(sorted(voters))) for ref, voters in votes.items() if ref.round <= newest + 1]
    credible = [candidate for candidate in candidates if len(candidate.voters) >= min(quorum, majority)]
    return sorted(credible, key=lambda c: (len(c.voters) < quorum, -c.ref.round, c.ref.root))


def _median(values: list[int]) -> int:
    return sorted(values)[len(values) // 2] if values else 0


class StateFetcher:
    """Brings a joiner into the swarm."""

    def __init__(
        self,
        *,
        trainer: Trainer,
        compute: Compute,
        store: BlobStore,
        transport: Transport,
        directory: Directory,
        events: EventLog,
    ) -> None:
        self._trainer, self._compute, self._store = trainer, compute, store
        self._transport, self._directory, self._events = transport, directory, events

    async def swarm_round(self) -> int | None:
        """The median round of the live trainers, None if there are none."""
        rounds = sorted(record.round for record in self._trainers().values())
        return rounds[(len(rounds) - 1) // 2] if rounds else None

    async def fetch(self) -> SnapshotRef | None:
        """Adopt the swarm's state; None when nobody trains yet, or is not beyond the first round, so that the initial weights
        are the state.

        Raises:
            TransportError: the swarm is further on, but no state that passes can be had.
        """
        deadline_s = asyncio.get_running_loop().time() + WAIT_FOR_STATE_S
        failed: set[SnapshotRef] = set()
        looks = swarm = 0
        while True:
            await self._directory.refresh()
            trainers = self._trainers()
            for candidate in choose_snapshots(trainers):
                if candidate.ref not in failed:
                    if await self._adopt(candidate):
                        return candidate.ref
                    failed.add(candidate.ref)
            looks += 1
            swarm = max(swarm, await self.swarm_round() or 0)
            if swarm <= 1 and looks >= NUM_LOOKS:
                return None
            if asyncio.get_running_loop().time() >= deadline_s:
                raise TransportError(
                    f"the swarm is at round {swarm}, but none of its peers gives a state that passes; try again in a minute"
                )
            if looks == NUM_LOOKS:
                self._events.emit("waiting_for_state", swarm_round=swarm)
            await asyncio.sleep(LOOK_AGAIN_S)  # votes are on their way, or the next snapshot is

    def _trainers(self) -> dict[PeerId, PeerRecord]:
        return {
            peer: record
            for peer, record in self._directory.peers.items()
            if record.role == "trainer" and record.state == "training"
        }

    def _expected_loss(self) -> float:
        """The median of what the trainers measured, which a minority of liars cannot move; chance when none has."""
        losses = [record.val_loss for record in self._trainers().values() if record.val_loss is not None]
        return statistics.median_low(losses) if losses else math.log(self._trainer.manifest.model.vocab_size)

    async def _adopt(self, candidate: Candidate) -> bool:
        ref, blob = candidate.ref, BlobId(candidate.ref.root)
        limit = max_snapshot_bytes(self._trainer.manifest.model.num_parameters)
        try:
            await fetch_blob(
                blob, transport=self._transport, store=self._store, donors=list(candidate.voters), max_bytes=limit
            )
            data = await asyncio.to_thread(self._store.read, blob)
            weights = await self._compute.run(self._trainer.read_snapshot, data)
        except (CheckpointError, LlmNodeError) as error:
            self._events.emit("state_refused", round=ref.round, root=ref.root[:12], reason=str(error))
            return False
        loss = await self._compute.run(self._trainer.evaluate, weights)
        if not loss < self._expected_loss() + LOSS_MARGIN:
            self._events.emit("state_refused", round=ref.round, root=ref.root[:12], reason=f"held-out loss {loss:.2f}")
            return False
        swarm = await self.swarm_round()
        await self._compute.run(self._trainer.adopt, weights, ref.round if swarm is None else swarm)
        self._events.emit("state_adopted", round=ref.round, loss=round(loss, 4), donors=len(candidate.voters))
        return True
