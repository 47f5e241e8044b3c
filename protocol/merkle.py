"""The Merkle tree that names a blob: its root commits to the size and to every 1 MiB leaf.

    leaf    = SHA-256(0x00 ‖ bytes of the leaf)       LEAF_BYTES each, the last one shorter; an empty blob has one empty leaf
    node    = SHA-256(0x01 ‖ left ‖ right)            level by level from the left; an odd last node moves up unchanged
    blob id = SHA-256(0x02 ‖ size as u64 big-endian ‖ top node)

The three prefixes keep a leaf from being passed off as a node, and the size keeps a prefix of a blob from being passed off as
the blob. Peers exchange the flat list of leaf hashes and never proofs: the list is 2⁻¹⁵ of the data, one request checks it
against the id, and from then on each leaf is checked alone, whoever sends it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from protocol.errors import ProtocolError
from protocol.ids import BlobId

__all__ = ["HASH_BYTES", "LEAF_BYTES", "MAX_BLOB_BYTES", "LeafList", "leaf_hash", "num_leaves", "parse_blob_id"]

LEAF_BYTES = 1 << 20
MAX_BLOB_BYTES = 1 << 38
"""256 GiB: φ and δ of a 34-billion-parameter model in fp32. The leaf list is then 8 MiB."""
HASH_BYTES = 32

_BLOB_ID = re.compile(r"[0-9a-f]{64}")


def parse_blob_id(text: str) -> BlobId:
    """`text` as a blob id.

    Raises:
        ValueError: it is not 64 lower-case hexadecimal digits (so an id can never be a path).
    """
    if not _BLOB_ID.fullmatch(text):
        raise ValueError("a blob id is 64 lower-case hexadecimal digits")
    return BlobId(text)


def num_leaves(size_bytes: int) -> int:
    """Number of leaves of a blob; at least one."""
    return max(1, -(-size_bytes // LEAF_BYTES))


def leaf_hash(data: bytes | bytearray | memoryview) -> bytes:
    """Hash of one leaf's bytes, 32 bytes."""
    digest = hashlib.sha256(b"\x00")
    digest.update(data)
    return digest.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafList:
    """What a blob id commits to.

    Args:
        size_bytes: size of the blob.
        hashes: leaf hashes, concatenated; exactly HASH_BYTES × num_leaves(size_bytes).
    """

    size_bytes: int
    hashes: bytes

    def __post_init__(self) -> None:
        assert 0 <= self.size_bytes <= MAX_BLOB_BYTES
        assert len(self.hashes) == HASH_BYTES * num_leaves(self.size_bytes)

    @classmethod
    def of_leaves(cls, leaves: Iterable[bytes | memoryview]) -> Self:
        """Hash a blob given leaf by leaf; all but the last must be LEAF_BYTES long."""
        hashes = bytearray()
        size_bytes = 0
        for leaf in leaves:
            assert size_bytes % LEAF_BYTES == 0, "only the last leaf may be short"
            hashes += leaf_hash(leaf)
            size_bytes += len(leaf)
        return cls(size_bytes=size_bytes, hashes=bytes(hashes) or leaf_hash(b""))

    @classmethod
    def checked(cls, blob: BlobId, *, size_bytes: int, hashes: bytes) -> Self:
        """A list received from elsewhere, accepted only if it is the one that `blob` commits to.

        Raises:
            ProtocolError: it is not.
        """
        if not 0 <= size_bytes <= MAX_BLOB_BYTES or len(hashes) != HASH_BYTES * num_leaves(size_bytes):
            raise ProtocolError("leaf list has the wrong length for its size")
        leaves = cls(size_bytes=size_bytes, hashes=hashes)
        if leaves.blob != blob:
            raise ProtocolError("leaf list does not hash to the blob id")
        return leaves

    @property
    def num_leaves(self) -> int:
        """Number of leaves."""
        return len(self.hashes) // HASH_BYTES

    def leaf_bytes(self, index: int) -> int:
        """Length of leaf `index`."""
        return min(LEAF_BYTES, self.size_bytes - index * LEAF_BYTES)

    def matches(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether `data` is leaf `index`."""
        expected = self.hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
        return len(data) == self.leaf_bytes(index) and leaf_hash(data) == expected

    @property
    def blob(self) -> BlobId:
        """The id of the blob with these leaves (hashes about num_leaves nodes)."""
        level = [self.hashes[start : start + HASH_BYTES] for start in range(0, len(self.hashes), HASH_BYTES)]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            odd = level[-1:] if len(level) % 2 else []
            level = [hashlib.sha256(b"\x01" + left + right).digest() for left, right in pairs] + odd
        return BlobId(hashlib.sha256(b"\x02" + self.size_bytes.to_bytes(8, "big") + level[0]).hexdigest())
