"""Content-addressed files: tokenizer, data shards and model states, each named by the Merkle root of its bytes.

A store is one folder. A finished blob is the file `<id>`; beside it `<id>.leaves` keeps its leaf hashes, a cache that is checked
when read. A blob under way is `<id>.partial` (protocol/partial_blob.py). A file gets its final name only by rename after fsync,
so whatever has the name is whole.

Nothing here trusts the disk: `read` and `read_leaf` hash what they return. A finished blob with a bad leaf is turned back into a
partial one, so that mending it costs one leaf and not the whole download.

All methods block on the disk; asynchronous callers use a thread (protocol/blob_exchange.py does).
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from protocol.errors import ProtocolError, UserError
from protocol.ids import BlobId
from protocol.merkle import LEAF_BYTES, MAX_BLOB_BYTES, LeafList, parse_blob_id
from protocol.partial_blob import PartialBlob, disk_errors

__all__ = ["LEAF_BYTES", "MAX_BLOB_BYTES", "BlobDamagedError", "BlobStore"]


class BlobDamagedError(UserError):
    """A stored blob is missing or does not match its id any more; fetching it again mends it."""


class BlobStore:
    """A folder of blobs, owned by one process.

    Args:
        root: the folder; created with mode 0700 when missing. Files left by a crashed `put` are removed.

    Raises:
        UserError: the folder can not be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fetch_locks: dict[BlobId, asyncio.Lock] = {}
        with disk_errors("keep blobs", root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for stale in root.glob("*.tmp"):
                stale.unlink(missing_ok=True)

    def path(self, blob: BlobId) -> Path:
        """Where the finished blob is or would be; reading it directly skips the verification."""
        return self.root / parse_blob_id(blob)

    def partial_path(self, blob: BlobId) -> Path:
        """Where the unfinished blob is or would be."""
        return self.root / f"{parse_blob_id(blob)}.partial"

    def _leaves_path(self, blob: BlobId) -> Path:
        return self.root / f"{parse_blob_id(blob)}.leaves"

    def has(self, blob: BlobId) -> bool:
        """Whether the blob is here, whole."""
        return self.path(blob).is_file()

    def blobs(self) -> list[BlobId]:
        """Ids of all finished blobs, sorted."""
        return sorted(BlobId(entry.name) for entry in self.root.iterdir() if len(entry.name) == 64 and entry.is_file())

    def size_bytes(self, blob: BlobId) -> int:
        """Size of a finished blob.

        Raises:
            BlobDamagedError: it is not here.
        """
        try:
            return self.path(blob).stat().st_size
        except FileNotFoundError:
            raise self._missing(blob) from None

    def put(self, data: bytes | bytearray | memoryview) -> BlobId:
        """Store `data`; changes nothing when it is already here.

        Raises:
            UserError: the disk is full or not writable, or the data exceeds MAX_BLOB_BYTES. The store is as before.
        """
        return self._ingest(_slices(data))

    def put_file(self, path: Path) -> BlobId:
        """Copy a file into the store, hashing what is copied.

        Raises:
            UserError: as `put`, or the file can not be read.
        """
        try:
            source = path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
        with source:
            return self._ingest(_file_leaves(source))

    def _ingest(self, leaves: Iterable[bytes | memoryview]) -> BlobId:
        temporary = self.root / f"{secrets.token_hex(8)}.tmp"
        with disk_errors("keep a blob", self.root):
            try:
                with temporary.open("xb") as file:
                    listed = LeafList.of_leaves(_copied(leaves, file))
                    file.flush()
                    os.fsync(file.fileno())
                if not self.has(listed.blob):
                    self._name(temporary, listed)
            finally:
                temporary.unlink(missing_ok=True)
        return listed.blob

    def _name(self, written: Path, leaves: LeafList) -> None:
        """Give a whole, synced file its name, durably."""
        self._cache(leaves)
        written.replace(self.path(leaves.blob))
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _cache(self, leaves: LeafList) -> None:
        """Keep a leaf list beside its blob. It may fail or be lost: whoever reads it checks it, and hashes the blob instead."""
        with suppress(OSError):
            self._leaves_path(leaves.blob).write_bytes(leaves.hashes)

    def remove(self, blob: BlobId) -> None:
        """Forget a blob, finished or partial; nothing happens when it is not here."""
        with disk_errors("remove a blob", self.root):
            for path in (self.path(blob), self._leaves_path(blob), self.partial_path(blob)):
                path.unlink(missing_ok=True)

    def read(self, blob: BlobId) -> bytes:
        """The whole blob, verified.

        Raises:
            BlobDamagedError: it is not here, or does not match its id and is now a partial blob again.
        """
        with self._reading(blob) as file:
            data = file.read()
        if LeafList.of_leaves(_slices(data)).blob != blob:
            raise self._damaged(blob)
        return data

    def verify(self, blob: BlobId) -> LeafList:
        """Hash the whole blob and renew its cached leaf list, which is returned.

        Raises:
            BlobDamagedError: it is not here, or does not match its id and is now a partial blob again.
        """
        with self._reading(blob) as file:
            leaves = LeafList.of_leaves(_file_leaves(file))
        if leaves.blob != blob:
            raise self._damaged(blob)
        self._cache(leaves)
        return leaves

    def leaves(self, blob: BlobId) -> LeafList:
        """The leaf list of a finished blob, from the cache beside it or else by hashing the blob.

        Raises:
            BlobDamagedError: the blob is not here or does not match its id.
        """
        size_bytes = self.size_bytes(blob)
        try:
            return LeafList.checked(blob, size_bytes=size_bytes, hashes=self._leaves_path(blob).read_bytes())
        except (FileNotFoundError, ProtocolError):
            return self.verify(blob)

    def read_leaf(self, blob: BlobId, leaves: LeafList, index: int) -> bytes:
        """Leaf `index` of a finished blob, verified, so that damage on our disk never makes us a liar.

        Raises:
            BlobDamagedError: it is not here, or does not match its id and is now a partial blob again.
        """
        with self._reading(blob) as file:
            data = os.pread(file.fileno(), leaves.leaf_bytes(index), index * LEAF_BYTES)
        if not leaves.matches(index, data):
            raise self._damaged(blob)
        return data

    def finish(self, partial: PartialBlob) -> None:
        """Close a partial blob that misses nothing and give it its final name, durably.

        Raises:
            UserError: the disk is full or not writable.
        """
        assert not partial.missing
        partial.sync()
        partial.close()
        with disk_errors("keep a blob", self.root):
            self._name(partial.path, partial.leaves)

    def fetch_lock(self, blob: BlobId) -> asyncio.Lock:
        """Held by whoever fetches `blob`, so that two tasks never write one partial file."""
        return self._fetch_locks.setdefault(blob, asyncio.Lock())

    @contextmanager
    def _reading(self, blob: BlobId) -> Iterator[BinaryIO]:
        with disk_errors("read a blob", self.root):
            try:
                with self.path(blob).open("rb") as file:
                    yield file
            except FileNotFoundError:
                raise self._missing(blob) from None

    def _missing(self, blob: BlobId) -> BlobDamagedError:
        return BlobDamagedError(f"blob {blob[:12]}… is not in {self.root}; fetch it first")

    def _damaged(self, blob: BlobId) -> BlobDamagedError:
        with disk_errors("set a damaged blob aside", self.root):
            if self.has(blob):
                self.path(blob).replace(self.partial_path(blob))
        return BlobDamagedError(f"blob {blob[:12]}… in {self.root} is damaged on disk; fetch it again to mend it")


def _slices(data: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    view = memoryview(data).cast("B")
    for start in range(0, len(view), LEAF_BYTES):
        yield view[start : start + LEAF_BYTES]


def _file_leaves(file: BinaryIO) -> Iterator[bytes]:
    while leaf := file.read(LEAF_BYTES):
        yield leaf


def _copied(leaves: Iterable[bytes | memoryview], target: BinaryIO) -> Iterator[bytes | memoryview]:
    """Pass the leaves on, each written to `target` first; the size is capped before anything is named."""
    size_bytes = 0
    for leaf in leaves:
        size_bytes += len(leaf)
        if size_bytes > MAX_BLOB_BYTES:
            raise UserError(f"a blob has at most {MAX_BLOB_BYTES} bytes; split the data")
        target.write(leaf)
        yield leaf
