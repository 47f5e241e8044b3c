"""Tiny runs for the node's tests: real text, a real tokenizer, a model small enough to train in milliseconds."""

from __future__ import annotations

import inspect
import shlex
import textwrap
from pathlib import Path
from typing import Any

from node.publish import RunRequest, make_run
from protocol.blobs import BlobStore
from protocol.identity import Identity
from protocol.publication import SignedManifest

__all__ = ["ORGANISER", "TINY", "tiny_run", "write_corpus"]

ORGANISER = Identity.generate(bytes(32))

TINY: dict[str, Any] = {
    "model.vocab_size": 300,
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.max_sequence_tokens": 64,
    "inner.sequence_tokens": 16,
    "inner.lr": 0.01,
    "inner.warmup_steps": 4,
    "inner.max_sequences": 8,
    "sync.inner_steps": 5,
    "sync.total_rounds": 4,
    "sync.round_target_s": 2.0,
    "sync.exchange_timeout_s": 2.0,
    "sync.snapshot_rounds": 1,
}


def write_corpus(folder: Path) -> Path:
    """A folder with a few dozen real text files: Python sources, cut to pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    for module in (shlex, textwrap, inspect):
        source = inspect.getsource(module)
        for start in range(0, min(len(source), 60_000), 3000):
            (folder / f"{module.__name__}-{start:06}.txt").write_text(source[start : start + 3000])
    return folder


def tiny_run(folder: Path, **settings: Any) -> tuple[SignedManifest, BlobStore]:
    """Make a tiny run below `folder`; `settings` override TINY, with `__` for the dot (`sync__total_rounds=2`). Who meets whom when
    is drawn by everything in the manifest, so another `name` is another draw."""
    name = settings.pop("name", "tiny")
    overrides = TINY | {key.replace("__", "."): value for key, value in settings.items()}
    store = BlobStore(folder / "blobs")
    request = RunRequest(
        name=name,
        organiser=ORGANISER.peer_id,
        model="1m",
        data=str(write_corpus(folder / "corpus")),
        heldout_tokens=512,
        overrides=overrides,
    )
    return SignedManifest.sign(make_run(request, store), ORGANISER), store
