"""Which blobs lie in the store because they are snapshots, in a file: the next session clears away what this one leaves.

A blob does not tell what it is, and a store has the blobs of all runs of a home. So a snapshot is listed before its first byte is
written, as a whole or in part, and taken off the list once it is gone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from pathlib import Path

from protocol.blobs import BlobStore
from protocol.errors import LlmNodeError, UserError
from protocol.ids import BlobId
from protocol.merkle import parse_blob_id

__all__ = ["FILE", "SnapshotList"]

FILE = "snapshots.json"


class SnapshotList:
    """The snapshots that one peer has brought into its store, those of earlier sessions included.

    Args:
        store: where they are.
        folder: of the run; None lists them nowhere.
    """

    def __init__(self, store: BlobStore, folder: Path | None) -> None:
        self._store = store
        self._file = None if folder is None else folder / FILE
        self._roots = set() if self._file is None else _read(self._file)

    def add(self, root: str) -> None:
        """A snapshot is about to come, or has just been made."""
        if root not in self._roots:
            self._roots.add(root)
            self._write()

    def remove(self, root: str) -> None:
        """Remove a snapshot, or as much of it as has come."""
        with contextlib.suppress(UserError):  # the disk cannot be written: the file stays, until the next session
            self._store.remove(BlobId(root))
            if root in self._roots:
                self._roots.remove(root)
                self._write()

    def clear(self, *, but: Collection[str]) -> None:
        """Remove all that are listed but these."""
        for root in self._roots - set(but):
            self.remove(root)

    def _write(self) -> None:
        if self._file is None:
            return
        temporary = self._file.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # then the next session does not know
            temporary.write_text(json.dumps(sorted(self._roots)))  # not flushed: the loop must not wait for the disk
            temporary.replace(self._file)


def _read(path: Path) -> set[str]:
    """Empty if there is no list, or none that can be read."""
    try:
        return {parse_blob_id(root) for root in json.loads(path.read_text())}
    except (OSError, ValueError, TypeError, LlmNodeError):
        return set()
