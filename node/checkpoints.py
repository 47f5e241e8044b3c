"""One peer's checkpoints: what to start from, and a save in the background after every round.

Saving never stops training: the writer is handed a copy, skips a save while it is busy with the one before, and a full disk is a
warning. Loading is never silent: damage that was passed over is told, and a checkpoint of another run is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.batches import RoundBatches
from model.checkpoint import load_newest
from model.checkpoint_writer import CheckpointWriter
from model.errors import CheckpointError
from node.compute import Compute
from node.events import EventLog
from node.training_state import TrainingState
from protocol.errors import UserError

__all__ = ["Checkpoints", "SavedState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A checkpoint as it was read."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def round(self) -> int:
        """The round it is in."""
        return int(self.meta["round"])

    @property
    def cursor(self) -> int | None:
        """Where in the round's data it stopped; None at a round's start."""
        return None if self.meta["cursor"] is None else int(self.meta["cursor"])


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: where they are; None keeps none (simulated swarms).
    """

    def __init__(self, folder: Path | None, *, compute: Compute, events: EventLog) -> None:
        self._folder, self._compute, self._events = folder, compute, events
        self._generation = 0
        self._writer: CheckpointWriter | None = None

    async def load(self) -> SavedState | None:
        """The newest whole checkpoint, None if none was ever saved.

        Raises:
            UserError: all saved ones are damaged.
        """
        if self._folder is None:
            return None
        try:
            loaded = await self._compute.run(load_newest, self._folder)
        except CheckpointError as error:
            raise UserError(str(error)) from None
        if loaded is None:
            return None
        self._generation = loaded.generation
        for damage in loaded.damage:
            self._events.emit("checkpoint_damaged", reason=damage)
        return SavedState(tensors=loaded.tensors, meta=loaded.meta)

    async def restore(self, trainer: TrainingState, saved: SavedState) -> None:
        """Put a checkpoint into the trainer.

        Raises:
            UserError: it belongs to another model.
        """
        try:
            await self._compute.run(trainer.restore, saved.tensors, saved.meta)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint in {self._folder} does not fit this run ({error}); move it away to start afresh"
            ) from None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Accept saves until the block is left, which finishes the write in progress."""
        if self._folder is None:
            yield
            return
        with CheckpointWriter(self._folder) as self._writer:
            yield
        self._writer = None

    async def save(self, trainer: TrainingState, batches: RoundBatches | None, *, final: bool = False) -> None:
        """Hand the state over; a `final` one is waited for, and never skipped."""
        writer = self._writer
        if writer is None:
            return
        if final:
            await asyncio.to_thread(writer.flush)
        # One call, so that no step comes between reading the counters and copying the tensors.
        if await self._compute.run(
            lambda: writer.submit(*trainer.checkpoint(batches), generation=self._generation + 1)
        ):
            self._generation += 1
        if final:
            await asyncio.to_thread(writer.flush)
        for result in writer.take_results():
            if result.error is not None:
                self._events.emit("checkpoint_failed", reason=str(result.error))
            else:
                self._events.emit("checkpoint_saved", bytes=result.num_bytes, seconds=round(result.seconds, 3))
