"""A blob under way: a sparse file of the full size, into which verified leaves are written in any order.

No bitmap is kept beside it. After a crash the leaves that are there are hashed again, which is as fast as reading them and can
not disagree with the data, whatever the disk kept of the last writes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from protocol.errors import UserError
from protocol.merkle import LEAF_BYTES, LeafList

__all__ = ["PartialBlob", "disk_errors"]


@contextmanager
def disk_errors(action: str, where: Path) -> Iterator[None]:
    """Turn the disk's refusals (full, read-only, over quota, …) into one line for the user."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"cannot {action} in {where}: {reason}; free space there or choose another folder") from error


class PartialBlob:
    """An open, unfinished blob. A context manager: leaving it closes the file and keeps it for the next attempt.

    `rehash` and `write` may run in threads, and such a thread goes on when its task has been cancelled and the file is closed.
    The lock makes `close` wait for at most one leaf, after which they do nothing, instead of reaching for whatever file
    has the descriptor by then.

    Args:
        path: the file; made when missing.
        leaves: what the blob must become.

    Raises:
        UserError: the disk is full or not writable.
    """

    def __init__(self, path: Path, leaves: LeafList) -> None:
        self.path = path
        self.leaves = leaves
        self.missing = set(range(leaves.num_leaves))
        """Indices of the leaves that are not known to be here."""
        self._lock = threading.Lock()
        with disk_errors("keep a blob", path.parent):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._is_new = os.fstat(self._descriptor).st_size == 0
                os.ftruncate(self._descriptor, leaves.size_bytes)
            except BaseException:
                os.close(self._descriptor)
                raise

    def rehash(self) -> None:
        """Find the leaves that an earlier attempt has written, by hashing the file; costs nothing for a new one.

        Raises:
            UserError: the disk can not be read.
        """
        for index in sorted(self.missing) if not self._is_new else []:
            with self._lock, disk_errors("read a blob", self.path.parent):
                if self._descriptor < 0:
                    return
                data = os.pread(self._descriptor, self.leaves.leaf_bytes(index), index * LEAF_BYTES)
            if self.leaves.matches(index, data):
                self.missing.discard(index)

    @property
    def done_bytes(self) -> int:
        """Bytes of all leaves that are here."""
        return self.leaves.size_bytes - sum(self.leaves.leaf_bytes(index) for index in self.missing)

    def write(self, index: int, data: bytes | bytearray) -> bool:
        """Keep `data` as leaf `index` if it matches; returns whether it does.

        Raises:
            UserError: the disk is full or not writable; the leaf stays missing.
        """
        if not self.leaves.matches(index, data):
            return False
        with self._lock, disk_errors("keep a blob", self.path.parent):
            if self._descriptor >= 0:
                self._write_all(memoryview(data), index * LEAF_BYTES)
                self.missing.discard(index)
        return True

    def _write_all(self, data: memoryview, offset: int) -> None:
        while data:
            num_written = os.pwrite(self._descriptor, data, offset)  # short just before the disk is full
            data = data[num_written:]
            offset += num_written

    def sync(self) -> None:
        """Make what was written durable.

        Raises:
            UserError: the disk could not.
        """
        with self._lock, disk_errors("keep a blob", self.path.parent):
            assert self._descriptor >= 0, "closed"
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; idempotent. Waits while another thread moves one leaf."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
