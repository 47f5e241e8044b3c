"""Checkpoints that survive a kill at any moment, a full disk and flipped bits.

A generation is numbered files in one folder: `00000007-0000.safetensors`, … and `00000007.json`, written last. The JSON holds
size and SHA-256 of each data file and the caller's own state, and starts with its own hash: a generation exists when its JSON is
whole and every file agrees with it. Each file goes to disk by `write_durably`, in that order; only then older
generations go, except the newest of them. Loading takes the newest whole generation and tells what was wrong with newer ones.

The number given to `save_checkpoint` is the truth: leftovers with higher numbers are remains of damage that
loading has passed over, and they go as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.durable import TEMPORARY_SUFFIX, Written, flush_folder, write_durably
from model.errors import CheckpointError
from model.weights import decode_tensors, encode_chunks

__all__ = ["LoadedCheckpoint", "load_newest", "save_checkpoint"]

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_FILE_BYTES = 256 << 20
_NAME = re.compile(r"^(\d{8})(?:\.json|-\d{4}\.safetensors)(?:\.tmp)?$")
_HASH_CHARS = 64


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A whole generation.

    Args:
        tensors: by name.
        meta: the caller's state.
        generation: its number; the next save takes the next number.
        damage: one line for each newer generation that could not be used; empty when all is well.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    generation: int
    damage: tuple[str, ...]


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, generation: int) -> int:
    """Write a generation and remove all others but the newest older one.

    Args:
        folder: made if missing.
        tensors: by name; they must not change meanwhile.
        meta: anything JSON can hold.
        generation: number of this checkpoint, from 0; one more than the loaded or last saved one.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: the disk is full or can not be written; the previous generation is untouched, and nothing of this one
            takes room.
    """
    assert 0 <= generation < 10**8
    stem = f"{generation:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder, [f"{stem}.json"])  # void a damaged generation of this number before its files change
        files = []
        for number, group in enumerate(_groups(tensors)):
            name = f"{stem}-{number:04d}.safetensors"
            files.append((name, write_durably(folder / name, encode_chunks(group))))
        description = _describe(generation, files, meta)
        write_durably(folder / f"{stem}.json", [description])
        _prune(folder, generation, {name for name, _ in files})
    except OSError as error:
        _discard_unfinished(folder, stem)
        raise CheckpointError(
            f"checkpoint {generation} could not be written to {folder}: {error.strerror or error}; "
            "free some space, the previous checkpoint is untouched"
        ) from error
    return len(description) + sum(written.num_bytes for _, written in files)


def load_newest(folder: Path) -> LoadedCheckpoint | None:
    """Read the newest whole generation.

    Returns:
        It, with a report of the damage passed over (also logged as warnings), or None when no save has ever finished.

    Raises:
        CheckpointError: generations were saved here, but all are damaged.
    """
    damage: list[str] = []
    try:
        generations = _generations(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"checkpoint folder {folder} can not be read: {error.strerror}; mend its rights"
        ) from None
    for generation in sorted(generations, reverse=True):
        try:
            tensors, meta = _load(folder, generation)
        except CheckpointError as error:
            _LOG.warning("checkpoint passed over", extra={"generation": generation, "reason": str(error)})
            damage.append(str(error))
            continue
        return LoadedCheckpoint(tensors=tensors, meta=meta, generation=generation, damage=tuple(damage))
    if any(finished for finished in generations.values()):
        raise CheckpointError(f"no checkpoint in {folder} is whole ({damage[0]}); move the folder away to start afresh")
    return None


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors in the order of their names, packed into files of about `_FILE_BYTES`."""
    group: dict[str, Tensor] = {}
    room = _FILE_BYTES
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        if group and size > room:
            yield group
            group, room = {}, _FILE_BYTES
        group[name] = tensors[name]
        room -= size
    yield group


def _describe(generation: int, files: list[tuple[str, Written]], meta: Mapping[str, Any]) -> bytes:
    body = json.dumps(
        {
            "format": _FORMAT,
            "generation": generation,
            "files": [{"name": name, "bytes": w.num_bytes, "sha256": w.sha256} for name, w in files],
            "meta": dict(meta),
        },
        sort_keys=True,
        allow_nan=False,
    ).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _generations(folder: Path) -> dict[int, bool]:
    """Every generation with a file in the folder, and whether its description is there, so that its save had finished."""
    found: dict[int, bool] = {}
    for path in folder.iterdir():
        if match := _NAME.match(path.name):
            number = int(match[1])
            found[number] = found.get(number, False) or path.suffix == ".json"
    return found


def _load(folder: Path, generation: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    description = _description(folder, generation)
    for entry in description["files"]:
        data = _read(folder / entry["name"], generation)
        if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"checkpoint {generation}: {entry['name']} is damaged")
        tensors.update(decode_tensors(data))
    meta: dict[str, Any] = description["meta"]
    return tensors, meta


def _description(folder: Path, generation: int) -> dict[str, Any]:
    path = folder / f"{generation:08d}.json"
    if not path.exists():
        raise CheckpointError(f"checkpoint {generation}: its description is missing; its save did not finish")
    data = _read(path, generation)
    body = data[_HASH_CHARS + 1 :]
    if data[: _HASH_CHARS + 1] != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise CheckpointError(f"checkpoint {generation}: {path.name} is damaged")
    description: dict[str, Any] = json.loads(body)
    if description["format"] != _FORMAT or description["generation"] != generation:
        raise CheckpointError(f"checkpoint {generation}: {path.name} belongs to another version or generation")
    return description


def _read(path: Path, generation: int) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {generation}: {path.name} can not be read: {error.strerror}") from None


def _prune(folder: Path, generation: int, files: set[str]) -> None:
    older = [number for number, finished in _generations(folder).items() if finished and number < generation]
    kept = {max(older)} if older else set()
    doomed: list[str] = []
    for path in folder.iterdir():
        if match := _NAME.match(path.name):
            number, temporary = int(match[1]), path.name.endswith(TEMPORARY_SUFFIX)
            own = number == generation and (path.name in files or path.suffix == ".json")
            if temporary or not (own or number in kept):
                doomed.append(path.name)
    _remove(folder, sorted(doomed, key=lambda name: not name.endswith(".json")))


def _discard_unfinished(folder: Path, stem: str) -> None:
    """Remove the data of a generation without a description: nobody reads it, and it takes the room that the next save needs."""
    with contextlib.suppress(OSError):
        if not (folder / f"{stem}.json").exists():
            for path in folder.glob(f"{stem}-*"):
                path.unlink(missing_ok=True)


def _remove(folder: Path, names: list[str]) -> None:
    """Remove files in this order, descriptions first, so that no description outlives its data."""
    present = [name for name in names if (folder / name).exists()]
    for name in present:
        (folder / name).unlink()
    if present:
        flush_folder(folder)
