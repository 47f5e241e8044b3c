"""A home as a peer leaves it behind, for the tests of what comes after."""

from __future__ import annotations

import shutil
from pathlib import Path

from model.checkpoint import save_checkpoint
from node.home import Home, keep_manifest
from node.trainer import Trainer
from protocol.blobs import BlobStore
from protocol.publication import SignedManifest

__all__ = ["checkpoint_files", "flip_bit", "left_home"]


def left_home(
    folder: Path, run: tuple[SignedManifest, BlobStore], trainer: Trainer, *, num_checkpoints: int = 2
) -> Home:
    """A home with the run's manifest and blobs, and the checkpoints of rounds 1, 2, …"""
    signed, store = run
    home = Home.at(folder)
    shutil.copytree(store.root, home.blobs, dirs_exist_ok=True)
    keep_manifest(home.run(signed.manifest.run_id), signed)
    for round in range(1, num_checkpoints + 1):
        trainer.round = round
        trainer.replica.phi.add_(0.001)
        tensors, meta = trainer.checkpoint(None)
        save_checkpoint(home.run(signed.manifest.run_id) / "checkpoints", tensors, meta, generation=round)
    return home


def checkpoint_files(home: Home, generation: int) -> list[Path]:
    """The files of one generation, the data first."""
    (folder,) = home.runs()
    return sorted((folder / "checkpoints").glob(f"{generation:08d}*"), key=lambda path: path.suffix == ".json")


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
