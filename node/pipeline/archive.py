"""The newest state of every stage in one place, and the whole model made from them.

No peer of a pipelined run holds the whole model, so somebody has to collect it: the bootstrap node keeps, for every stage, the
newest snapshot for which enough of its replicas vote (node/catchup.py has the rule). It is a copy: a run goes on without it,
and any node may keep one. `llm-node export` and `generate` read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from model.durable import write_durably
from model.errors import CheckpointError
from model.stage import Stage
from model.weights import decode_weights
from node.catchup import choose_snapshots
from node.events import EventLog
from node.snapshots import max_snapshot_bytes
from node.training_state import model_config
from protocol.blob_exchange import fetch_blob
from protocol.blobs import BlobStore
from protocol.directory import SwarmView
from protocol.errors import LlmNodeError, UserError
from protocol.ids import BlobId, PeerId
from protocol.manifest import Manifest
from protocol.records import PeerRecord, SnapshotRef
from protocol.transport import Stream, Transport
from protocol.wire import Message, read_message, write_message

__all__ = [
    "STATE_PROTOCOL",
    "StageArchive",
    "StateReply",
    "StateRequest",
    "assemble",
    "decode_stage",
    "kept_copies",
    "swarm_round",
]

FILE, COPIES_FILE = "stages.json", "copies.json"
"""Lists of who collects all stages, and of who keeps a few copies: one folder may have seen both."""
STATE_PROTOCOL = "/llm-node/stage-state/1"
REQUEST_TIMEOUT_S = 10.0


class StateRequest(Message):
    """Asks what the receiver keeps of a stage."""

    run: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    stage: Annotated[int, Field(ge=0, lt=64)]


class StateReply(Message):
    """The snapshot that is kept, or nothing."""

    kept: SnapshotRef | None


def swarm_round(records: Mapping[PeerId, PeerRecord]) -> int:
    """The median round of the peers of all stages; 0 if there are none."""
    rounds = [r.round for r in records.values() if r.stage is not None and r.state == "training"]
    return median_low(rounds) if rounds else 0


class StageArchive:
    """Keeps one snapshot of each of some stages, and tells whoever asks which.

    Args:
        stages: to keep; all of them, unless said otherwise.
        folder: of the run; what is kept is listed there. None lists it nowhere.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        stages: Sequence[int] | None = None,
        directory: SwarmView,
        transport: Transport,
        store: BlobStore,
        folder: Path | None,
        events: EventLog,
    ) -> None:
        self._manifest, self._directory, self._transport = manifest, directory, transport
        self._stages = range(manifest.pipeline.stages) if stages is None else stages
        self._store, self._events = store, events
        self._file = None if folder is None else folder / (FILE if stages is None else COPIES_FILE)
        self._collected = None if folder is None or stages is None else folder / FILE
        self._held = {} if self._file is None else _read(self._file)
        self._refused: set[SnapshotRef] = set()
        transport.handle(STATE_PROTOCOL, self.serve)

    async def serve(self, stream: Stream) -> None:
        """Say what is kept of a stage."""
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            request = await read_message(stream, StateRequest)
        is_kept = request.run == self._manifest.run_id and request.stage in self._stages
        ref = self._held.get(request.stage) if is_kept else None
        await write_message(stream, StateReply(kept=ref))

    def drop_others(self, *, in_use: Collection[str]) -> None:
        """Give up what is kept of stages that are not ours to keep: we held another stage before.

        Args:
            in_use: roots of snapshots that this peer has for another reason.
        """
        others = {stage: ref for stage, ref in self._held.items() if stage not in self._stages}
        for stage, ref in others.items():
            del self._held[stage]
            if ref.root not in in_use:
                self._drop(ref)
        if others:
            self._list()

    async def look(self) -> None:
        """Take what is newer than what is here."""
        newest = swarm_round(self._directory.peers) + 1
        for stage in self._stages:
            records = self._directory.peers
            replicas = {peer: r for peer, r in records.items() if r.stage == stage and r.state == "training"}
            held = self._held.get(stage)
            for candidate in choose_snapshots(replicas):
                # A round that the other stages have not reached is a lie, here and in what is held.
                is_newer = held is None or candidate.ref.round > held.round or held.round > newest
                if candidate.ref.round > newest:
                    continue
                is_tried = is_newer and candidate.ref not in self._refused
                if is_tried and await self._fetch(stage, candidate.ref, list(candidate.voters)):
                    break

    async def _fetch(self, stage: int, ref: SnapshotRef, donors: list[PeerId]) -> bool:
        blob, limit = BlobId(ref.root), max_snapshot_bytes(self._manifest.model.num_parameters)
        try:
            await fetch_blob(blob, transport=self._transport, store=self._store, donors=donors, max_bytes=limit)
            await asyncio.to_thread(lambda: decode_stage(self._manifest, stage, self._store.read(blob)))
        except CheckpointError as error:
            self._refused.add(ref)
            self._drop(ref)
            self._events.emit("state_refused", round=ref.round, root=ref.root[:12], reason=str(error))
            return False
        except LlmNodeError:
            return False  # unreachable just now
        old = self._held.get(stage)
        self._held[stage] = ref
        self._list()
        if old is not None and old.root != ref.root:
            self._drop(old)
        self._events.emit("stage_archived", stage=stage, round=ref.round, root=ref.root[:12])
        return True

    def _list(self) -> None:
        if self._file is None:
            return
        try:
            text = json.dumps({str(number): each.model_dump() for number, each in sorted(self._held.items())})
            write_durably(self._file, [text.encode()])
        except OSError as error:
            self._events.emit("disk_error", path=str(self._file), reason=error.strerror or type(error).__name__)

    def _drop(self, ref: SnapshotRef) -> None:
        collected = {} if self._collected is None else _read(self._collected)
        if ref.root in {each.root for each in collected.values()}:
            return
        with contextlib.suppress(UserError):
            self._store.remove(BlobId(ref.root))


def assemble(manifest: Manifest, folder: Path, store: BlobStore) -> tuple[dict[str, Tensor], int]:
    """The whole model from an archive.

    Args:
        folder: of the run.

    Returns:
        Its weights by name, and the oldest round among the stages.

    Raises:
        UserError: stages are missing or damaged.
    """
    held = _read(folder / FILE)
    missing = [str(stage) for stage in range(manifest.pipeline.stages) if stage not in held]
    if missing:
        raise UserError(
            f"stage {', '.join(missing)} of {manifest.name} is not in this home; export from the home of the bootstrap node, "
            "once every stage has published a state"
        )
    weights: dict[str, Tensor] = {}
    for stage, ref in held.items():
        try:
            weights |= decode_stage(manifest, stage, store.read(BlobId(ref.root)))
        except CheckpointError as error:
            raise UserError(
                f"the state of stage {stage} is damaged ({error}); let the bootstrap node fetch it again"
            ) from None
    return weights, min(ref.round for ref in held.values())


def decode_stage(manifest: Manifest, stage: int, data: bytes) -> dict[str, Tensor]:
    """The weights in a stage's snapshot.

    Raises:
        CheckpointError: other names, shapes or types, or values that are not finite.
    """
    with torch.device("meta"):
        shapes = Stage(model_config(manifest), stage, manifest.pipeline.stages)
    return decode_weights(data, {name: tuple(p.shape) for name, p in shapes.named_parameters()})


def kept_copies(folder: Path) -> dict[int, SnapshotRef]:
    """By stage, the copies that the folder of a run lists; nothing if there is no list that can be read."""
    return _read(folder / COPIES_FILE)


def _read(file: Path) -> dict[int, SnapshotRef]:
    """What an archive lists; nothing if there is none that can be read."""
    try:
        listed: Mapping[str, object] = json.loads(file.read_text())
        return {int(stage): SnapshotRef.model_validate(ref) for stage, ref in listed.items()}
    except (OSError, ValueError, AttributeError):
        return {}
