"""Saving checkpoints in the background while training goes on.

`submit` copies the tensors, which takes a memory copy and not a disk write, and returns; one thread writes. There is never more
than one copy: while a write is under way another submit is refused, since a slow disk must cost freshness and not memory.
A failed write is a result like any other: training goes on, and the owner shows the warning.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from model.checkpoint import save_checkpoint
from model.errors import CheckpointError

__all__ = ["CheckpointWriter", "SaveResult"]


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """How one save ended; `error` is None when the generation is safely on disk."""

    generation: int
    seconds: float
    num_bytes: int
    error: CheckpointError | None


@dataclass(frozen=True)
class _Job:
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    generation: int


class CheckpointWriter:
    """A thread that writes checkpoints. Leaving its `with` block finishes the write it is in.

    Args:
        folder: of the checkpoints; one writer per folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed = threading.Condition()
        self._buffers: dict[str, Tensor] = {}
        self._job: _Job | None = None
        self._results: list[SaveResult] = []
        self._bug: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._bug is not None and error is None:
            raise self._bug

    @property
    def busy(self) -> bool:
        """Whether a write is under way."""
        return self._job is not None

    def submit(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, generation: int) -> bool:
        """Copy and queue a checkpoint.

        Args:
            tensors: by name; free to change as soon as this returns.
            meta: JSON-able state; shared with the writer, so give a fresh one.
            generation: as for `save_checkpoint`.

        Returns:
            False, without copying anything, while an earlier write is under way.
        """
        with self._changed:
            self._raise_bug()
            if self._job is not None:
                return False
            self._job = _Job(self._copy(tensors), dict(meta), generation)
            self._changed.notify_all()
            return True

    def flush(self, *, timeout_s: float | None = None) -> bool:
        """Wait until nothing is being written.

        Returns:
            False when the time ran out first; the write goes on.
        """
        with self._changed:
            idle = self._changed.wait_for(lambda: self._job is None or self._bug is not None, timeout_s)
            self._raise_bug()
            return idle

    def take_results(self) -> list[SaveResult]:
        """The saves that ended since the last call, oldest first."""
        with self._changed:
            results, self._results = self._results, []
            return results

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy into buffers kept from the last time where they fit, which spares the page faults of fresh memory."""
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            old = self._buffers.get(name)
            if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
                copies[name] = old.copy_(tensor.detach())
            else:
                copies[name] = tensor.detach().cpu().clone()
        self._buffers = copies
        return copies

    def _raise_bug(self) -> None:
        if self._bug is not None:
            raise self._bug

    def _run(self) -> None:
        try:
            while job := self._next_job():
                result = self._write(job)
                with self._changed:
                    self._results.append(result)
                    self._job = None
                    self._changed.notify_all()
        except BaseException as error:  # root of this thread: a bug is raised again in the owner's thread
            with self._changed:
                self._bug = error
                self._changed.notify_all()

    def _next_job(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._job is not None or self._closing)
            return self._job

    def _write(self, job: _Job) -> SaveResult:
        start_s = time.monotonic()
        num_bytes, failure = 0, None
        try:
            num_bytes = save_checkpoint(self._folder, job.tensors, job.meta, generation=job.generation)
        except CheckpointError as error:
            failure = error
        seconds = time.monotonic() - start_s
        return SaveResult(generation=job.generation, seconds=seconds, num_bytes=num_bytes, error=failure)
