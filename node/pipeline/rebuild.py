"""The state of a stage that has lost all its replicas.

1. Its newest snapshot that anybody keeps: the bootstrap node keeps one of every stage, and every stage peer one of the stage after
   its own (node/pipeline/archive.py). Anybody may claim to keep one. So those come first that the lost replicas vouched for in
   their last records, by the rule of node/catchup.py, and our own copy, which we took by that rule; who has just come knows no
   such record, and takes what several keep before what one does.
2. Else the mean of the layers of the two stages around it. A layer adds to the residual stream, and neighbours have learnt
   similar things, so this is far better than starting anew (CheckFree, arXiv 2506.15461; weighted evenly here). Embedding and head
   have no neighbours.
3. Else the initial weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from model.errors import CheckpointError
from model.stage import stage_layers
from node.catchup import MAX_RESUME_LAG, choose_snapshots
from node.compute import Compute
from node.events import EventLog
from node.pipeline.archive import STATE_PROTOCOL, StateReply, StateRequest, decode_stage, swarm_round
from node.pipeline.trainer import StageTrainer
from node.snapshots import max_snapshot_bytes
from protocol.blob_exchange import fetch_blob
from protocol.blobs import BlobStore
from protocol.directory import Directory
from protocol.errors import LlmNodeError
from protocol.ids import BlobId, PeerId, RunId
from protocol.records import SnapshotRef
from protocol.transport import Transport
from protocol.wire import read_message, write_message

__all__ = ["StageRebuilder", "ask_kept", "mean_of_neighbours"]

ASK_TIMEOUT_S = 10.0
NUM_TRIES, TRY_AGAIN_S = 5, 3.0
MAX_ASKED = 32
LEAST_VOUCHERS = 2
"""Lost replicas that must vouch for what replaces a checkpoint of our own: one that nobody else has seen may be made up, and a
goodbye is enough to be counted as lost."""


class StageRebuilder:
    """Finds a state for the stage of `trainer` when nobody holds it.

    Args:
        own: the copy that we keep ourselves, if we do.
    """

    def __init__(
        self,
        trainer: StageTrainer,
        *,
        directory: Directory,
        transport: Transport,
        store: BlobStore,
        compute: Compute,
        events: EventLog,
        own: SnapshotRef | None = None,
    ) -> None:
        self._own = own
        self._trainer, self._manifest = trainer, trainer.manifest
        self._directory, self._transport, self._store = directory, transport, store
        self._compute, self._events = compute, events

    async def rebuild(self, *, newer_than: int | None = None) -> bool:
        """Put a state into the trainer, at the round of the other stages; False if the swarm is new or nothing is left.

        Args:
            newer_than: the round of a checkpoint of our own: better is only a later copy that two lost replicas vouched for, or
                that we took ourselves.
        """
        swarm, stage = self.swarm_round(), self._trainer.stage
        if swarm == 0:
            return False
        for _ in range(NUM_TRIES):
            kept = await self._kept(newest=swarm + 1, newer_than=newer_than)
            for ref, donors in kept:
                weights = await self._fetch(ref, stage, donors)
                if weights is not None:
                    await self._adopt(weights, swarm, source="snapshot", of_round=ref.round)
                    return True
            if not kept:
                break
            await asyncio.sleep(TRY_AGAIN_S)  # somebody has it, and is out of reach for a moment
        if newer_than is not None:
            return False
        around = [neighbour for neighbour in (stage - 1, stage + 1) if 0 <= neighbour < self._manifest.pipeline.stages]
        found = [weights for neighbour in around if (weights := await self._newest_of(neighbour)) is not None]
        if not found:
            self._events.emit("stage_lost", stage=stage, round=swarm)
            return False
        layers = stage_layers(self._manifest.model.num_layers, self._manifest.pipeline.stages)[stage]
        own = {name: tensor.clone() for name, tensor in self._trainer.flat.views(self._trainer.replica.phi).items()}
        await self._adopt(mean_of_neighbours(own, found, layers), swarm, source="neighbours", of_round=swarm)
        return True

    def swarm_round(self) -> int:
        """The median round of all stages' peers; 0 if there are none."""
        return swarm_round(self._directory.peers)

    async def _adopt(self, weights: dict[str, Tensor], swarm: int, *, source: str, of_round: int) -> None:
        await self._compute.run(self._trainer.adopt, weights, swarm)
        self._events.emit("stage_rebuilt", stage=self._trainer.stage, round=of_round, source=source)

    async def _kept(self, *, newest: int, newer_than: int | None) -> list[tuple[SnapshotRef, list[PeerId]]]:
        """Snapshots of our stage that are kept, none newer than that round; in order of trust, then the newest first. With a
        checkpoint of our own, only the trusted of a later round."""
        records = self._directory.peers
        asked = sorted(records, key=lambda peer: records[peer].role != "bootstrap")[:MAX_ASKED]
        holders: dict[SnapshotRef, list[PeerId]] = {} if self._own is None else {self._own: []}
        run, stage = self._manifest.run_id, self._trainer.stage
        answers = await asyncio.gather(
            *(ask_kept(peer, stage=stage, run=run, transport=self._transport) for peer in asked)
        )
        for peer, ref in zip(asked, answers, strict=True):
            if ref is not None:
                holders.setdefault(ref, []).append(peer)
        trusted = self._vouched_for(least=1 if newer_than is None else LEAST_VOUCHERS)
        if self._own is not None and self._own.round + MAX_RESUME_LAG >= newest:
            trusted.add(self._own)
        kept = [
            (0 if ref in trusted else 1 if len(donors) > 1 else 2, -ref.round, ref, donors)
            for ref, donors in holders.items()
            if ref.round <= newest
        ]
        if newer_than is not None:
            kept = [item for item in kept if item[0] == 0 and item[2].round > newer_than]
        return [(ref, donors) for _, _, ref, donors in sorted(kept, key=lambda item: item[:2])]

    def _vouched_for(self, *, least: int) -> set[SnapshotRef]:
        """Snapshots for which enough of the stage's peers voted before they were gone, at least so many."""
        gone = {
            peer: r
            for peer, r in self._directory.departed.items()
            if r.stage == self._trainer.stage and r.role == "trainer" and r.state in ("training", "leaving")
        }
        return {candidate.ref for candidate in choose_snapshots(gone) if len(candidate.voters) >= least}

    async def _newest_of(self, stage: int) -> dict[str, Tensor] | None:
        records = self._directory.peers
        replicas = {peer: r for peer, r in records.items() if r.stage == stage and r.state == "training"}
        for candidate in choose_snapshots(replicas):
            weights = await self._fetch(candidate.ref, stage, list(candidate.voters))
            if weights is not None:
                return weights
        return None

    async def _fetch(self, ref: SnapshotRef, stage: int, donors: list[PeerId]) -> dict[str, Tensor] | None:
        blob, limit = BlobId(ref.root), max_snapshot_bytes(self._manifest.model.num_parameters)
        try:
            await fetch_blob(blob, transport=self._transport, store=self._store, donors=donors, max_bytes=limit)
            return await asyncio.to_thread(lambda: decode_stage(self._manifest, stage, self._store.read(blob)))
        except CheckpointError as error:
            self._events.emit("state_refused", round=ref.round, root=ref.root[:12], reason=str(error))
        except LlmNodeError:
            pass  # unreachable just now
        return None


async def ask_kept(peer: PeerId, *, stage: int, run: RunId, transport: Transport) -> SnapshotRef | None:
    """What a peer keeps of a stage; None if that is nothing, or it does not say."""
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            async with await transport.open(peer, STATE_PROTOCOL) as stream:
                await write_message(stream, StateRequest(run=run, stage=stage))
                return (await read_message(stream, StateReply)).kept
    except (LlmNodeError, TimeoutError):
        return None


def mean_of_neighbours(
    own: dict[str, Tensor], neighbours: Sequence[dict[str, Tensor]], layers: range
) -> dict[str, Tensor]:
    """A stage's weights made of those around it: layer by layer the mean of the layers at the same place in the neighbours.

    Args:
        own: by name; what is no layer stays as it is.
        neighbours: one or two stages' weights by name.
        layers: of the stage.
    """
    found = dict(own)
    for place, layer in enumerate(layers):
        prefix = f"model.layers.{layer}."
        for name in (name for name in own if name.startswith(prefix)):
            rest = name.removeprefix(prefix)
            alike = []
            for weights in neighbours:
                numbers = sorted({int(key.split(".")[2]) for key in weights if key.startswith("model.layers.")})
                number = numbers[min(place, len(numbers) - 1)]
                alike.append(weights[f"model.layers.{number}.{rest}"].to(own[name]))
            found[name] = torch.stack(alike).mean(0)
    return found
