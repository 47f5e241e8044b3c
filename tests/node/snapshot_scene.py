"""One peer that keeps snapshots, and others that offer theirs."""

from __future__ import annotations

from pathlib import Path

from model.weights import encode_weights
from node.compute import VirtualCompute
from node.snapshot_list import SnapshotList
from node.snapshots import SnapshotKeeper
from node.trainer import Trainer
from protocol.records import SnapshotRef
from tests.node.swarm import Node, listening, reference, trainers

__all__ = ["EVERY", "ROUND", "Scene"]

EVERY = 4
"""Rounds between two snapshots."""
ROUND = 8


class Scene:
    """Node 0 keeps snapshots; the others are records and blob servers."""

    def __init__(
        self,
        trainer: Trainer,
        nodes: list[Node],
        *,
        own_losses: dict[int, float] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.trainer, self.nodes = trainer, nodes
        trainer.round = ROUND
        self.events, self.heard = listening()
        self.shown: list[SnapshotRef] = []
        self.keeper = SnapshotKeeper(
            run=trainer.manifest.run_id,
            peer=nodes[0].peer,
            every_rounds=EVERY,
            trainer=trainer,
            compute=VirtualCompute(seconds_per_call=0.1),
            store=nodes[0].store,
            transport=nodes[0].transport,
            events=self.events,
            publish=self._show,
            own_loss=lambda finished: trainer.evaluate() if own_losses is None else own_losses[finished],
            snapshots=SnapshotList(nodes[0].store, folder),
        )

    def _show(self, held: list[SnapshotRef]) -> None:
        self.shown = held

    def offer(self, *numbers: int, round: int, factor: float = 1.01, data: bytes | None = None) -> SnapshotRef:
        """A snapshot in the stores of these nodes."""
        weights = {name: view * factor for name, view in self.trainer.flat.views(self.trainer.replica.phi).items()}
        return reference(round, encode_weights(weights) if data is None else data, *(self.nodes[n] for n in numbers))

    async def keep(self, offers: dict[int, list[SnapshotRef]], *, round: int = ROUND) -> None:
        """One look at what the others show."""
        await self.keeper.keep_copies(trainers(offers, round=round))

    def names(self) -> list[str]:
        return [name for name, _ in self.heard]

    @property
    def blobs(self) -> set[str]:
        """What lies in the keeper's store."""
        return set(self.nodes[0].store.blobs())
