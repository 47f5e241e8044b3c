"""One trainer's state among those of the others: where it begins, who may copy it, and when the swarm's takes its place.

A joiner finds a state (node/catchup.py). After every round snapshots are published and copied (node/snapshots.py), and a peer whose
weights have strayed from everybody's, or are too old to be averaged with (node/freshness.py), takes the swarm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from node.catchup import Rebuilder, StateFetcher, find_start
from node.checkpoints import Checkpoints
from node.compute import Compute
from node.freshness import Freshness
from node.progress import Progress
from node.role import Role
from node.service import Service
from node.snapshot_list import SnapshotList
from node.snapshots import SnapshotKeeper
from node.training_state import TrainingState
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.records import PeerRecord, SnapshotRef

__all__ = ["SharedState"]


class SharedState:
    """Made for one trainer; `start` first.

    Args:
        trainer: holds the state.
        role: which has been taken; its peers are those who have the like.
        folder: of the run in this home; None keeps nothing.
    """

    def __init__(
        self,
        trainer: TrainingState,
        *,
        role: Role,
        service: Service,
        identity: Identity,
        compute: Compute,
        progress: Progress,
        folder: Path | None,
    ) -> None:
        self._trainer, self._role, self._progress = trainer, role, progress
        self._events, self._peer = service.events, identity.peer_id
        self._freshness = Freshness(progress)
        snapshots = SnapshotList(service.store, folder)
        self._fetcher = StateFetcher(
            trainer=trainer,
            compute=compute,
            store=service.store,
            transport=service.transport,
            directory=role.view,
            events=service.events,
            snapshots=snapshots,
            wish=self._wish_for_a_state,
        )
        self._keeper = SnapshotKeeper(
            run=trainer.manifest.run_id,
            peer=identity.peer_id,
            every_rounds=trainer.manifest.sync.snapshot_rounds,
            trainer=trainer,
            compute=compute,
            store=service.store,
            transport=service.transport,
            events=service.events,
            publish=self._show_snapshots,
            own_loss=progress.val_loss_after,
            snapshots=snapshots,
        )

    async def start(self, checkpoints: Checkpoints, *, rebuilder: Rebuilder | None) -> int | None:
        """Put the state to begin with into the trainer.

        Args:
            checkpoints: this peer's own.
            rebuilder: for a stage that nobody holds any more.

        Returns:
            The data cursor to resume from, if any.

        Raises:
            UserError: the checkpoints are damaged, or of another run.
            TransportError: the swarm cannot supply a state.
        """
        trainer = self._trainer
        start = await find_start(
            trainer, fetcher=self._fetcher, checkpoints=checkpoints, events=self._events, rebuilder=rebuilder
        )
        if start.is_rebuilt:  # whoever comes to help needs it before our first round is over
            await self._keeper.publish_in_turn(trainer.round, {})
        if start.adopted is not None:
            self._keeper.adopt(start.adopted)
        self._keeper.clear()  # not before: a state that was fetched in part is gone on with
        swarm = self._fetcher.swarm_round()
        self._freshness.took(state_round=start.state_round, at_round=trainer.round, swarm_round=swarm)
        return start.cursor

    async def after_round(self, round: int, others: Mapping[PeerId, PeerRecord]) -> None:
        """Take the swarm's state if ours is no good, and publish ours if it is due.

        Args:
            round: that has ended.
            others: who train the same.
        """
        if self._trainer.replica.admission.is_astray:
            self._events.emit("astray", round=round)
            await self._return_to_the_swarm(at_least=0)
        elif self._freshness.after_round(others):
            await self._return_to_the_swarm(at_least=self._freshness.wanted_round)
        if not self._progress.wants_state:
            everybody = self._role.view.peers.items()
            wanted = any(record.wants_state for peer, record in everybody if peer != self._peer)
            await self._keeper.after_round(round, others, is_wanted=wanted)

    async def keep_copies(self, others: Mapping[PeerId, PeerRecord]) -> None:
        """Hold copies of what they publish, and vouch for it."""
        await self._keeper.keep_copies(others)

    async def publish_in_turn(self, round: int, others: Mapping[PeerId, PeerRecord]) -> None:
        """Publish the state after that round, unless one of them does."""
        await self._keeper.publish_in_turn(round, others)

    @property
    def held(self) -> list[SnapshotRef]:
        """Snapshots that this peer holds."""
        return self._keeper.held

    def let_go(self) -> None:
        """Hold none of them any more."""
        self._keeper.let_go()

    async def _return_to_the_swarm(self, *, at_least: int) -> None:
        """Fetch a state of at least that round, if there is one."""
        adopted = await self._fetcher.refetch(at_least=at_least)
        if adopted is not None:
            self._keeper.adopt(adopted)
            self._freshness.replaced(state_round=adopted.round, at_round=self._trainer.round)

    def _wish_for_a_state(self) -> None:
        self._progress.wants_state = True

    def _show_snapshots(self, held: list[SnapshotRef]) -> None:
        self._progress.snapshots = held
