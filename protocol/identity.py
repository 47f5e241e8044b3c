"""A peer's identity: one Ed25519 key that names it, authenticates its streams and signs its records.

The key file is a libp2p `PrivateKey` protobuf, the very file that the libp2p daemon is started with, so the transport's
identity and ours can not differ. The peer id is libp2p's own: base58 of an identity multihash around the `PublicKey`
protobuf. For Ed25519 that hash *is* the key, so every signature can be checked from the peer id alone, without a lookup. Both
messages are constant prefixes around raw bytes, which is why they are written out here instead of pulling in protobuf (whose
registry is the reason that two libp2p implementations can not share a process).

A signature covers `llm-node:<domain>\\0<data>`: what was signed for one purpose can not be replayed for another.

Source: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import UserError
from protocol.ids import PeerId

__all__ = ["SIGNATURE_BYTES", "Identity", "backup", "hold_identity", "is_peer_id", "restore", "verify"]

SIGNATURE_BYTES = 64

_SEED_BYTES = 32
_PUBLIC_BYTES = 32
_PRIVATE_PREFIX = bytes.fromhex("08011240")
"""PrivateKey{key_type: Ed25519, data: 64 bytes}; the 64 bytes are seed and public key."""
_PEER_ID_PREFIX = bytes.fromhex("0024" + "08011220")
"""Identity multihash of 36 bytes, around PublicKey{key_type: Ed25519, data: 32 bytes}."""
_KEY_FILE_BYTES = len(_PRIVATE_PREFIX) + _SEED_BYTES + _PUBLIC_BYTES
_PEER_ID_PATTERN = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key and the peer id that follows from it. Immutable; the key never appears in its repr."""

    peer_id: PeerId
    path: Path | None
    """The key file; None for an identity that lives in memory only."""
    _key: Ed25519PrivateKey = field(repr=False, compare=False)

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """Load the key file, or create it on the first start.

        Raises:
            UserError: the file is damaged, readable by others, or can not be read or written.
        """
        with suppress(FileNotFoundError):
            return cls._load(path)
        return cls.create(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load an existing key file.

        Raises:
            UserError: there is none, or it is damaged, readable by others, or can not be read.
        """
        try:
            return cls._load(path)
        except FileNotFoundError:
            raise UserError(f"no identity at {path}; join a run or restore a backup first") from None

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make a new key and write it, never over an existing file.

        Raises:
            UserError: the file exists or can not be written.
        """
        data = _encode_key(Ed25519PrivateKey.generate())
        _write_new(path, data)
        return cls._from_key(_decode_key(data, path), path)

    @classmethod
    def generate(cls, seed: bytes | None = None) -> Self:
        """An identity in memory only, for tests and simulation.

        Args:
            seed: 32 bytes that determine the key; None for a random one.
        """
        key = Ed25519PrivateKey.generate() if seed is None else Ed25519PrivateKey.from_private_bytes(seed)
        return cls._from_key(key, None)

    def sign(self, domain: str, data: bytes) -> bytes:
        """64-byte Ed25519 signature of `data` for the purpose `domain`."""
        return self._key.sign(_signed_bytes(domain, data))

    @classmethod
    def _load(cls, path: Path) -> Self:
        data, mode = _read_key_file(path)
        if mode & 0o077:
            raise UserError(f"identity {path} can be read by other users of this machine; run: chmod 600 {path}")
        return cls._from_key(_decode_key(data, path), path)

    @classmethod
    def _from_key(cls, key: Ed25519PrivateKey, path: Path | None) -> Self:
        multihash = _PEER_ID_PREFIX + key.public_key().public_bytes_raw()
        return cls(PeerId(base58.b58encode(multihash).decode("ascii")), path, key)


def is_peer_id(text: str) -> bool:
    """Whether `text` is the peer id of an Ed25519 key, in its one spelling."""
    return _public_bytes(text) is not None


def verify(peer: PeerId, domain: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` was made by the holder of `peer`'s key over `data` for `domain`. Never raises on remote bytes."""
    public = _public_bytes(peer)
    if public is None or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _signed_bytes(domain, data))
    except (InvalidSignature, ValueError):
        return False
    return True


@contextmanager
def hold_identity(path: Path) -> Iterator[None]:
    """Keep every other process from using the identity at `path` while the context lasts.

    Two nodes with one key would take each other's streams and overwrite each other's records. The lock is the kernel's: it
    goes with its process, however that ends. Its file stays, since removing it would let two holders lock two files.

    Raises:
        UserError: another process holds it, or the lock file can not be opened.
    """
    lock_path = path.with_name(path.name + ".lock")
    try:
        _make_private_folder(lock_path.parent)
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _file_error("lock", lock_path, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process uses the identity {path}; stop it or choose another home folder") from None
    except OSError as error:
        os.close(descriptor)
        raise _file_error("lock", lock_path, error) from None
    try:
        yield
    finally:
        os.close(descriptor)


def backup(path: Path, target: Path) -> PeerId:
    """Copy the key file to `target`, which must not exist; returns whose key it is.

    Raises:
        UserError: there is no sound key at `path`, or `target` exists or can not be written.
    """
    identity = Identity.load(path)
    _write_new(target, _encode_key(identity._key))
    return identity.peer_id


def restore(source: Path, path: Path) -> PeerId:
    """Make the backup `source` this node's key file, never over an existing one; returns whose key it is.

    The backup may be readable by others (removable disks often know no modes); the restored file is not.

    Raises:
        UserError: `source` is missing or damaged, or `path` exists or can not be written.
    """
    try:
        data, _ = _read_key_file(source)
    except FileNotFoundError:
        raise UserError(f"no backup at {source}; check the path") from None
    identity = Identity._from_key(_decode_key(data, source), path)
    _write_new(path, data)
    return identity.peer_id


def _signed_bytes(domain: str, data: bytes) -> bytes:
    assert "\0" not in domain
    return b"llm-node:" + domain.encode() + b"\0" + data


def _public_bytes(peer: str) -> bytes | None:
    if _PEER_ID_PATTERN.fullmatch(peer) is None:  # also keeps the quadratic base58 decoder from long input
        return None
    multihash: bytes = base58.b58decode(peer)
    if len(multihash) != len(_PEER_ID_PREFIX) + _PUBLIC_BYTES or not multihash.startswith(_PEER_ID_PREFIX):
        return None
    return multihash[len(_PEER_ID_PREFIX) :]


def _encode_key(key: Ed25519PrivateKey) -> bytes:
    return _PRIVATE_PREFIX + key.private_bytes_raw() + key.public_key().public_bytes_raw()


def _decode_key(data: bytes, path: Path) -> Ed25519PrivateKey:
    if len(data) == _KEY_FILE_BYTES and data.startswith(_PRIVATE_PREFIX):
        key = Ed25519PrivateKey.from_private_bytes(data[len(_PRIVATE_PREFIX) : -_PUBLIC_BYTES])
        if _encode_key(key) == data:
            return key
    raise UserError(f"{path} is not a sound Ed25519 key file; restore it from a backup")


def _read_key_file(path: Path) -> tuple[bytes, int]:
    """The first bytes of the file, at most one more than a key has, and its permission bits."""
    try:
        with path.open("rb") as file:
            return file.read(_KEY_FILE_BYTES + 1), os.fstat(file.fileno()).st_mode & 0o777
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _file_error("read", path, error) from None


def _write_new(path: Path, data: bytes) -> None:
    """Create `path` with mode 0600, whatever the umask, and write `data` durably; nothing is left behind on failure."""
    try:
        _make_private_folder(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UserError(f"{path} exists and is never overwritten; move it away first") from None
    except OSError as error:
        raise _file_error("write", path, error) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _file_error("write", path, error) from None


def _make_private_folder(folder: Path) -> None:
    """Create the folder with mode 0700 if it is missing; an existing one is the owner's business."""
    if folder.is_dir():
        return
    _make_private_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)


def _file_error(action: str, path: Path, error: OSError) -> UserError:
    remedy = "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
    return UserError(f"can not {action} {path}: {error.strerror or 'unknown error'}; {remedy}")
