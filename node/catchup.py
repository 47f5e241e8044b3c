"""How a peer gets its starting state: its own checkpoint, the swarm's, or the run's initial weights.

1. Its own checkpoint, unless the swarm is more than MAX_RESUME_LAG rounds ahead.
2. A snapshot for which enough independent peers vote, fetched in pieces from all of them, and measured on the held-out set
   before it is used. The highest claimed round alone counts for nothing: a liar has one vote.
3. If nobody trains yet, the initial weights made from the manifest's seed; their hash was checked when the model was built.

The second way is also the way back for a peer whose weights have strayed from everybody's (`StateFetcher.refetch`).
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from model.errors import CheckpointError
from node.checkpoints import Checkpoints, SavedState
from node.compute import Compute
from node.events import EventLog
from node.snapshot_list import SnapshotList
from node.snapshots import max_snapshot_bytes
from node.training_state import TrainingState
from protocol.blob_exchange import fetch_blob
from protocol.blobs import BlobStore
from protocol.directory import SwarmView
from protocol.errors import LlmNodeError, TransportError
from protocol.ids import BlobId, PeerId
from protocol.records import PeerRecord, SnapshotRef
from protocol.transport import Transport

__all__ = ["MAX_RESUME_LAG", "NUM_VOTES", "Start", "StateFetcher", "choose_snapshots", "find_start"]

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
    """Brings a joiner into the swarm.

    Args:
        snapshots: lists those in the store.
        wish: called when no state that passes is there; the others should publish one.
    """

    def __init__(
        self,
        *,
        trainer: TrainingState,
        compute: Compute,
        store: BlobStore,
        transport: Transport,
        directory: SwarmView,
        events: EventLog,
        snapshots: SnapshotList | None = None,
        wish: Callable[[], None] = lambda: None,
    ) -> None:
        self._wish = wish
        self._list = snapshots or SnapshotList(store, None)
        self._trainer, self._compute, self._store = trainer, compute, store
        self._transport, self._directory, self._events = transport, directory, events
        self._refused: set[SnapshotRef] = set()
        self._unavailable: set[SnapshotRef] = set()

    def swarm_round(self) -> int | None:
        """The median round of the live trainers, None if there are none."""
        rounds = [record.round for record in self._trainers().values()]
        return statistics.median_low(rounds) if rounds else None

    async def look_for_swarm(self) -> int | None:
        """The same, after a few looks while nobody is seen: the directory may just not have answered yet."""
        for look in range(NUM_LOOKS):
            if look:
                await asyncio.sleep(LOOK_AGAIN_S)
            await self._directory.refresh()
            if (swarm := self.swarm_round()) is not None:
                return swarm
        return None

    async def fetch(self) -> SnapshotRef | None:
        """Adopt the swarm's state; None when nobody trains yet, or is not beyond the first round, so that the initial weights
        are the state.

        Raises:
            TransportError: the swarm is further on, but no state that passes can be had.
        """
        deadline_s = asyncio.get_running_loop().time() + WAIT_FOR_STATE_S
        looks = swarm = 0
        while True:
            await self._directory.refresh()
            if (adopted := await self._adopt_best()) is not None:
                return adopted
            looks += 1
            seen = self.swarm_round()
            swarm = swarm if seen is None else seen  # one look that finds nobody does not make the swarm vanish
            if swarm <= 1 and looks >= NUM_LOOKS:
                return None
            if asyncio.get_running_loop().time() >= deadline_s:
                raise TransportError(
                    f"the swarm is at round {swarm}, but none of its peers gives a state that passes; try again in a minute"
                )
            if looks == NUM_LOOKS:
                self._wish()
                self._events.emit("waiting_for_state", swarm_round=swarm)
            await asyncio.sleep(LOOK_AGAIN_S)  # votes are on their way, or the next snapshot is

    async def refetch(self, *, at_least: int = 0) -> SnapshotRef | None:
        """Replace the weights of a training peer by the swarm's, if there is a state of at least round `at_least`; its round
        stays. None if no state that passes is to be had now.

        To be awaited before the next round is packed, since an exchange under way is forgotten. The inner optimizer starts anew:
        its moments belong to the weights that were given up.
        """
        await self._directory.refresh()
        adopted = await self._adopt_best(at_round=self._trainer.round, at_least=at_least)
        if adopted is not None:
            await self._compute.run(self._forget_the_past)
        return adopted

    def _forget_the_past(self) -> None:
        self._trainer.optimizer.state.clear()
        self._trainer.replica.admission.start_anew()

    async def _adopt_best(self, *, at_round: int | None = None, at_least: int = 0) -> SnapshotRef | None:
        """Try the credible snapshots in order. What is bad is not tried again; what cannot be had just now is."""
        for candidate in choose_snapshots(self._trainers()):
            is_tried = candidate.ref.round >= at_least and candidate.ref not in self._refused
            if is_tried and await self._adopt(candidate, at_round=at_round):
                return candidate.ref
        return None

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

    async def _adopt(self, candidate: Candidate, *, at_round: int | None) -> bool:
        """Enter at `at_round` with this state, at the swarm's when None; False if it does not pass."""
        ref, blob = candidate.ref, BlobId(candidate.ref.root)
        limit = max_snapshot_bytes(self._trainer.manifest.model.num_parameters)
        if is_brought := not self._store.has(blob):
            self._list.add(blob)
        try:
            await fetch_blob(
                blob, transport=self._transport, store=self._store, donors=list(candidate.voters), max_bytes=limit
            )
            data = await asyncio.to_thread(self._store.read, blob)
            weights = await self._compute.run(self._trainer.read_snapshot, data)
        except CheckpointError as error:
            return self._refuse(ref, str(error), is_brought=is_brought)
        except LlmNodeError as error:
            if ref not in self._unavailable:
                self._unavailable.add(ref)
                self._events.emit("state_unavailable", round=ref.round, root=ref.root[:12], reason=str(error))
            return False
        loss = await self._compute.run(self._trainer.evaluate, weights)
        if loss is not None and not loss < self._expected_loss() + LOSS_MARGIN:
            return self._refuse(ref, f"held-out loss {loss:.2f}", is_brought=is_brought)
        if at_round is None:
            at_round = self.swarm_round()
        await self._compute.run(self._trainer.adopt, weights, ref.round if at_round is None else at_round)
        self._trainer.is_shared = True
        self._events.emit("state_adopted", round=ref.round, loss=_rounded(loss), donors=len(candidate.voters))
        return True

    def _refuse(self, ref: SnapshotRef, reason: str, *, is_brought: bool) -> bool:
        self._refused.add(ref)
        if is_brought:
            self._list.remove(ref.root)
        self._events.emit("state_refused", round=ref.round, root=ref.root[:12], reason=reason)
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a peer starts from.

    Args:
        cursor: where in its round's data to go on, for a checkpoint from the middle of a round.
        adopted: the swarm's state that was taken, if it was one.
        state_round: rounds of training in the state.
        is_rebuilt: nobody held it any more.
    """

    is_rebuilt: bool = False
    cursor: int | None = None
    adopted: SnapshotRef | None = None
    state_round: int = 0


class Rebuilder(Protocol):
    """Finds a state that no live replica holds."""

    def swarm_round(self) -> int:
        """The round that the others are in, whatever they train; 0 if there are none."""

    async def rebuild(self, *, newer_than: int | None = None) -> bool:
        """Put a state into the trainer, or only a copy of a later round than that, if it can be trusted; whether there was one."""


async def find_start(
    trainer: TrainingState,
    *,
    fetcher: StateFetcher,
    checkpoints: Checkpoints,
    events: EventLog,
    rebuilder: Rebuilder | None = None,
) -> Start:
    """Put own checkpoint, the swarm's state, or the initial weights into the trainer.

    Args:
        rebuilder: for when nobody holds what we are to train, though a swarm is at work.

    Raises:
        UserError: the checkpoints here are damaged, or of another run.
        TransportError: the swarm is further on, but no state that passes can be had, and there is no checkpoint.
    """
    saved = await checkpoints.load()
    seen = None if saved is None and rebuilder is None else await fetcher.look_for_swarm()
    swarm = rebuilder.swarm_round() if seen is None and rebuilder is not None else seen
    if saved is not None and (swarm or 0) - saved.round <= MAX_RESUME_LAG:
        if seen is None and rebuilder is not None and await rebuilder.rebuild(newer_than=saved.round):
            return Start(is_rebuilt=True, state_round=trainer.round)  # others trained on after us, and are gone
        return await _resume(trainer, saved, checkpoints=checkpoints, events=events)
    if seen is None and rebuilder is not None and await rebuilder.rebuild():
        return Start(is_rebuilt=True, state_round=trainer.round)
    try:
        adopted = await fetcher.fetch()
    except TransportError:
        if saved is None:
            raise
        adopted = None
    if adopted is not None:
        return Start(adopted=adopted, state_round=adopted.round)
    if saved is not None:  # old, but better than nothing
        return await _resume(trainer, saved, checkpoints=checkpoints, events=events)
    swarm = fetcher.swarm_round()
    if swarm is not None:
        trainer.round = swarm
        events.emit("initial_state", round=swarm)
    return Start()


async def _resume(trainer: TrainingState, saved: SavedState, *, checkpoints: Checkpoints, events: EventLog) -> Start:
    await checkpoints.restore(trainer, saved)
    events.emit("resumed", round=trainer.round, step=trainer.step_in_round, tokens=trainer.tokens)
    return Start(cursor=saved.cursor, state_round=trainer.round)


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 4)
