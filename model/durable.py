"""Writing a file so that a crash leaves either the old one or the new one, never half of one.

The bytes go to a temporary name and are flushed to the disk, then the name is switched, then the folder is flushed: only after
that may anything rely on the file. A process killed in between leaves a temporary file, which nobody reads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TEMPORARY_SUFFIX", "Written", "flush_folder", "write_durably"]

TEMPORARY_SUFFIX = ".tmp"


@dataclass(frozen=True)
class Written:
    """What ended up in a file."""

    num_bytes: int
    sha256: str


def write_durably(path: Path, pieces: Iterable[bytes | bytearray | memoryview]) -> Written:
    """Write pieces to a file: temporary name, flush, rename, flush the folder.

    Args:
        path: the final name; an existing file is replaced as a whole.
        pieces: the content, hashed on its way.

    Returns:
        Size and hash of the content.

    Raises:
        OSError: nothing has changed under the final name, and the temporary file is gone.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with temporary.open("wb", buffering=0) as file:
            for piece in pieces:
                _write_all(file.fileno(), memoryview(piece))
                digest.update(piece)
                num_bytes += len(piece)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)
    return Written(num_bytes, digest.hexdigest())


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def flush_folder(folder: Path) -> None:
    """Make renames and removals in a folder survive a power cut, where the system offers it (Windows does not)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
