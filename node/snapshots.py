"""State for joiners: now and then one peer, chosen by lot, publishes its slow weights, and a few others keep copies.

In gossip averaging every replica differs a little, so there is no state that all peers hold anyway. Every `snapshot_rounds` rounds
the peer with the smallest PRF(run, epoch, peer) among those live publishes its slow weights as a content-addressed blob. The
next few peers in that order fetch it, measure its held-out loss, and if it is as good as their own, list it in their signed
record too: that is a vote. A joiner takes a state for which enough independent peers vote (node/catchup.py) and downloads
it from all of them at once. It is immutable, so a download never blocks anybody's training.

Where the newest snapshot is some rounds old and somebody wants a state (node/freshness.py), one comes before its time: each
round has a lot of its own for that. Whoever wants a state takes no part in the lots, since its own is old.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from model.errors import CheckpointError
from node.compute import Compute
from node.events import EventLog
from node.snapshot_list import SnapshotList
from node.training_state import TrainingState
from protocol.blob_exchange import fetch_blob
from protocol.blobs import BlobStore
from protocol.errors import LlmNodeError, UserError
from protocol.ids import BlobId, PeerId, RunId
from protocol.records import PeerRecord, SnapshotRef
from protocol.transport import Transport

__all__ = ["FRESH_ROUNDS", "NUM_KEEPERS", "SnapshotKeeper", "max_snapshot_bytes", "order_for_epoch", "order_for_round"]

NUM_KEEPERS = 4
"""Peers that hold each snapshot, its publisher included; one more than the votes a joiner asks for."""
NUM_KEPT = 2
"""Snapshots a peer keeps; as many as its record has room for."""
MAX_DISTANCE = 0.5
"""A stage's snapshot, which has no loss to judge by, may differ so much from the keeper's own weights, relatively."""
FRESH_ROUNDS = 3
"""A state so old can still be averaged with; a wanted snapshot comes so long after the last one at the earliest …"""
WANTED_SHARE = 4
"""… and after this part of the usual interval: a wish is easily made up, so it must not cost more than so many times the usual."""
LOSS_MARGIN = 0.15
"""A snapshot may be this much worse (nats per token) than the keeper's own weights."""


def order_for_epoch(run: RunId, epoch: int, peers: Iterable[PeerId]) -> list[PeerId]:
    """Peers by lot: the first publishes, the next few keep copies. Everybody computes the same order."""
    return sorted(peers, key=lambda peer: hashlib.sha256(f"{run}/snapshot/{epoch}/{peer}".encode()).digest())


def order_for_round(run: RunId, round: int, peers: Iterable[PeerId]) -> list[PeerId]:
    """The same for a snapshot of one round that somebody wants: another lot every round, since the one drawn may be a liar."""
    return sorted(peers, key=lambda peer: hashlib.sha256(f"{run}/snapshot-wanted/{round}/{peer}".encode()).digest())


def max_snapshot_bytes(num_parameters: int) -> int:
    """Size limit of a snapshot: fp32 weights and a generous header."""
    return 4 * num_parameters + (1 << 20)


class SnapshotKeeper:
    """Publishes, fetches, checks and drops snapshots on behalf of one trainer.

    Args:
        publish: called with the list of snapshots to show in this peer's record, newest last.
        own_loss: this peer's held-out loss at the start of a round. A snapshot of that round's end is compared with it and not
            with the latest one, since training has gone on while it spread; the round between them allows for the speed at
            which the loss falls just then.
    """

    def __init__(
        self,
        *,
        run: RunId,
        peer: PeerId,
        every_rounds: int,
        trainer: TrainingState,
        compute: Compute,
        store: BlobStore,
        transport: Transport,
        events: EventLog,
        publish: Callable[[list[SnapshotRef]], None],
        own_loss: Callable[[int], float | None],
        snapshots: SnapshotList,
    ) -> None:
        self._run, self._peer, self._every = run, peer, every_rounds
        self._epoch = -1
        self._is_wanted = False
        self._trainer, self._compute, self._store, self._transport = trainer, compute, store, transport
        self._events, self._publish, self._own_loss = events, publish, own_loss
        self._refused: dict[PeerId, int] = {}
        """Who showed a bad one, and the first round of which it is listened to again."""
        self._unavailable: set[str] = set()
        self._list = snapshots
        self.held: list[SnapshotRef] = []

    async def after_round(self, round: int, live: Mapping[PeerId, PeerRecord], *, is_wanted: bool = False) -> None:
        """Publish if it is this peer's turn.

        Args:
            round: just finished.
            live: the other trainers.
            is_wanted: whether somebody wants a state.
        """
        self._is_wanted = is_wanted
        if round // self._every != self._epoch:  # not `round % every`: a peer that skips rounds may skip that one
            self._epoch = round // self._every
            await self.publish_in_turn(round, live)
        elif is_wanted and round - self._newest_kept(live, round) >= self._least_interval:
            await self._publish_if_first(round, order_for_round(self._run, round, _settled(self._peer, live)))

    @property
    def _least_interval(self) -> int:
        return max(FRESH_ROUNDS, self._every // WANTED_SHARE)

    async def publish_in_turn(self, round: int, live: Mapping[PeerId, PeerRecord]) -> None:
        """Publish the state after `round` if the lot of that round says so."""
        await self._publish_if_first(
            round, order_for_epoch(self._run, round // self._every, _settled(self._peer, live))
        )

    def _newest_kept(self, live: Mapping[PeerId, PeerRecord], round: int) -> int:
        """Round of the newest snapshot up to `round` that this peer holds, or two others say they do; −1 for none."""
        shown = Counter(ref for record in live.values() for ref in set(record.snapshots))
        kept = [*self.held, *(ref for ref, votes in shown.items() if votes > 1)]
        return max((ref.round for ref in kept if ref.round <= round), default=-1)

    async def _publish_if_first(self, round: int, order: list[PeerId]) -> None:
        if order[0] != self._peer:
            return
        data = await self._compute.run(self._trainer.snapshot)
        try:
            root = await asyncio.to_thread(self._store.put, data)
        except UserError as error:  # the disk is full: training is worth more than a state for joiners
            self._events.emit("snapshot_failed", round=round, reason=str(error))
            return
        ref = SnapshotRef(round=round, root=root, size_bytes=len(data))
        self._hold(ref)
        self._events.emit("snapshot_published", round=round, root=ref.root[:12])

    def clear(self) -> None:
        """Remove what earlier sessions have left in the store, but for what this one holds."""
        self._list.clear(but=[ref.root for ref in self.held])

    def let_go(self) -> None:
        """Keep none any more: this peer goes to another stage, and those who stay have their own."""
        for ref in self.held:
            self._list.remove(ref.root)
        self.held = []
        self._publish([])

    async def keep_copies(self, live: Mapping[PeerId, PeerRecord]) -> None:
        """Fetch and check the newest snapshot that others publish, if the lot makes this peer one of its keepers."""
        for ref in self._offers(live):
            if await self._fetch(ref, _holders(ref, live)):
                self._hold(ref)
                self._events.emit("snapshot_kept", round=ref.round, root=ref.root[:12])
                return

    def _offers(self, live: Mapping[PeerId, PeerRecord]) -> list[SnapshotRef]:
        """What this peer should keep, newest first; what could not be had last time comes last.

        Any peer may claim anything, so a snapshot counts only from a peer that the lot allows to have it, and only for a round
        that the swarm can have reached. Who showed a bad one is not listened to again before another is due, whatever round it
        claims: checking costs a download and an evaluation.
        """
        self._refused = {peer: due for peer, due in self._refused.items() if peer in live}
        newest_held = max((ref.round for ref in self.held), default=-1)
        rounds = sorted([self._trainer.round, *(record.round for record in live.values())])
        newest_possible = rounds[(len(rounds) - 1) // 2] + self._every
        offers: set[SnapshotRef] = set()
        for peer, record in live.items():
            for ref in record.snapshots:
                is_new = max(newest_held + 1, self._refused.get(peer, 0)) <= ref.round <= newest_possible
                if is_new and any({peer, self._peer} <= set(keepers) for keepers in self._keepers(ref, live)):
                    offers.add(ref)
        for root in self._unavailable - {ref.root for ref in offers}:  # what came of it would stay for ever
            self._unavailable.remove(root)
            self._list.remove(root)
        return sorted(offers, key=lambda ref: (ref.root in self._unavailable, -ref.round, ref.root))

    def _keepers(self, ref: SnapshotRef, live: Mapping[PeerId, PeerRecord]) -> list[list[PeerId]]:
        """Those of each lot by which this snapshot may have been published: of the second only while somebody wants one."""
        peers = _settled(self._peer, live)
        in_turn = order_for_epoch(self._run, ref.round // self._every, peers)[:NUM_KEEPERS]
        wanted = order_for_round(self._run, ref.round, peers)[:NUM_KEEPERS] if self._is_wanted else []
        return [in_turn, wanted]

    def adopt(self, ref: SnapshotRef) -> None:
        """Hold the snapshot this peer itself started from; in what is left of this turn it publishes none of its own."""
        self._epoch = (self._trainer.round - 1) // self._every
        self._hold(ref)

    async def _fetch(self, ref: SnapshotRef, donors: list[PeerId]) -> bool:
        limit = max_snapshot_bytes(self._trainer.manifest.model.num_parameters)
        try:
            blob = BlobId(ref.root)
            if not self._store.has(blob):
                self._list.add(ref.root)
            await fetch_blob(blob, transport=self._transport, store=self._store, donors=donors, max_bytes=limit)
            data = await asyncio.to_thread(self._store.read, blob)
            weights = await self._compute.run(self._trainer.read_snapshot, data)
        except CheckpointError as error:
            return self._refuse(ref, donors, str(error))
        except LlmNodeError as error:  # unreachable just now: look again at the next refresh
            self._unavailable.add(ref.root)
            self._events.emit("snapshot_unavailable", round=ref.round, root=ref.root[:12], reason=str(error))
            return False
        loss, own = await self._compute.run(self._trainer.evaluate, weights), self._own_loss(ref.round)
        if loss is None and not await self._compute.run(self._trainer.distance, weights) <= MAX_DISTANCE:
            return self._refuse(ref, donors, "it is far from our own state")
        if own is not None and loss is not None and not loss <= own + LOSS_MARGIN:
            return self._refuse(ref, donors, f"its held-out loss {loss:.3f} is far above our own {own:.3f}")
        return True

    def _refuse(self, ref: SnapshotRef, holders: list[PeerId], reason: str) -> bool:
        due = min((ref.round // self._every + 1) * self._every, ref.round + self._least_interval)
        self._refused |= {peer: max(due, self._refused.get(peer, 0)) for peer in holders}
        self._list.remove(ref.root)
        self._events.emit("snapshot_refused", round=ref.round, root=ref.root[:12], reason=reason)
        return False

    def _hold(self, ref: SnapshotRef) -> None:
        self._list.add(ref.root)
        self.held = sorted([*(r for r in self.held if r.root != ref.root), ref], key=lambda r: r.round)
        for old in self.held[:-NUM_KEPT]:
            self._list.remove(old.root)
        self.held = self.held[-NUM_KEPT:]
        self._publish(list(self.held))


def _holders(ref: SnapshotRef, live: Mapping[PeerId, PeerRecord]) -> list[PeerId]:
    return [peer for peer, record in live.items() if ref in record.snapshots]


def _settled(own: PeerId, live: Mapping[PeerId, PeerRecord]) -> list[PeerId]:
    """Those who take part in the lots."""
    return [own, *(peer for peer, record in live.items() if not record.wants_state)]
