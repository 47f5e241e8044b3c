"""Where a node keeps its things on this machine.

    <home>/identity.key            the peer's Ed25519 key, 0600 (see `llm-node identity`)
    <home>/blobs/                  content-addressed data of all runs: tokenizers, shards, snapshots
    <home>/runs/<run id>/          manifest.bin, checkpoints/, peers.json, events.jsonl, status.db

The home is `--home`, else $LLM_NODE_HOME, else ~/.llm-node. Sockets live elsewhere, in a private 0700 folder with a short
path, because a Unix socket's path may not exceed 107 bytes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import UserError
from protocol.ids import RunId
from protocol.publication import SignedManifest

__all__ = ["Home", "keep_manifest", "kept_manifest"]


@dataclass(frozen=True, slots=True)
class Home:
    """The folder tree of one node."""

    root: Path

    @classmethod
    def at(cls, root: Path | None) -> Home:
        """The home at `root` or at the default place, created 0700 if missing.

        Raises:
            UserError: the folder cannot be made or written.
        """
        chosen = root or Path(os.environ.get("LLM_NODE_HOME", "~/.llm-node"))
        path = chosen.expanduser().absolute()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (path / "runs").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot use {path} as home: {error.strerror}; choose another with --home") from None
        if not os.access(path, os.W_OK):
            raise UserError(f"home {path} is not writable; choose another with --home")
        return cls(path)

    @property
    def identity(self) -> Path:
        """The key file."""
        return self.root / "identity.key"

    @property
    def blobs(self) -> Path:
        """The blob store's folder."""
        return self.root / "blobs"

    @property
    def runtime(self) -> Path:
        """Private folder for sockets; the same for the same home, so that leftovers of a crash are found and swept."""
        digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"llm-node-{os.getuid()}-{digest}"

    def run(self, run: RunId) -> Path:
        """The folder of one run, made if missing.

        Raises:
            UserError: it cannot be made.
        """
        path = self.root / "runs" / run
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from None
        return path

    def runs(self) -> list[Path]:
        """Folders of all runs this home took part in, the most recently used last."""
        found = [path for path in (self.root / "runs").iterdir() if (path / "manifest.bin").is_file()]
        return sorted(found, key=lambda path: (path / "manifest.bin").stat().st_mtime)


def keep_manifest(folder: Path, signed: SignedManifest) -> None:
    """Keep the run's manifest in its folder, and mark the run as the latest one of this home.

    A manifest that is there already is not written again, so that a full disk cannot cost it.

    Raises:
        UserError: it cannot be written.
    """
    path, data = folder / "manifest.bin", signed.pack()
    try:
        if path.is_file() and path.read_bytes() == data:
            os.utime(path)
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(folder, error) from None


def kept_manifest(folder: Path) -> SignedManifest:
    """The manifest of the run in this folder, its signature checked.

    Raises:
        UserError: it is damaged or cannot be read.
    """
    path = folder / "manifest.bin"
    remedy = "join the run again with --peer ADDRESS to mend it"
    try:
        return SignedManifest.unpack(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; free some space or choose another --home")
