"""Making a run: `llm-node init` turns a model preset and some text into a manifest and the blobs it names.

The tokenizer is trained on the organiser's text, the text is cut into token shards and a held-out set, and the initial weights'
hash is computed, so that every peer can check that it starts from the same bits. All blobs go into the organiser's blob
store, from which the bootstrap node serves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from model.config import PRESETS
from model.corpus import iter_files, iter_stdlib, sample_texts
from model.data import ShardIndex, build_dataset
from model.errors import DataError
from model.initial import initial_sha256
from model.tokenizer import Tokenizer, train_tokenizer
from node.training_state import model_config
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.ids import PeerId
from protocol.manifest import (
    DataSpec,
    InitialStateSpec,
    InnerSpec,
    Manifest,
    ModelSpec,
    PipelineSpec,
    SafetySpec,
    SyncSpec,
    TokenizerSpec,
)

__all__ = ["RunRequest", "make_run"]

SHARD_TOKENS = 1 << 19
"""Tokens per shard: 1 MiB as 16-bit numbers, one leaf of a blob."""
TOKENIZER_SAMPLE_CHARS = 4 << 20
LEARNING_RATES = {"1m": 3e-3, "3m": 3e-3, "10m": 2e-3, "25m": 1e-3, "50m": 1e-3, "100m": 6e-4, "300m": 4e-4}
DEFAULT_LEARNING_RATE = 3e-4
MUON_WIDTH = 1024
"""Widest model that is trained by Muon unless the organiser says otherwise. It learns far better per step (docs/benchmarks.md), but
a step costs it some 20 · width operations per weight, as much as training on 3 · width tokens: too much for a wide model on a
small peer."""
NO_HASH = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What an organiser asks for; everything else is a default that the manifest file shows and explains.

    Attributes:
        data: `stdlib`, `local`, or a folder.
        heldout: folder of held-out text for a `local` run.
        overrides: manifest settings by dotted name (`sync.alpha`), as given with `--set`.
        max_chars: use at most so much text; 0 for all of it.
    """

    name: str
    organiser: PeerId
    model: str
    data: str
    heldout: Path | None = None
    heldout_tokens: int = 1 << 15
    seed: int = 0
    max_chars: int = 0
    overrides: dict[str, Any] | None = None


def make_run(request: RunRequest, store: BlobStore) -> Manifest:
    """Build and store a run's blobs and return its manifest, not yet signed.

    Raises:
        UserError: unknown preset, unusable data, or settings that contradict each other.
    """
    draft = _draft(request)
    texts = list(_texts(request))
    tokenizer_json = train_tokenizer(sample_texts(texts, TOKENIZER_SAMPLE_CHARS), draft.model.vocab_size)
    tokenizer = Tokenizer(tokenizer_json)
    data = _store_data(draft, texts, tokenizer, store)
    # Little text gives fewer tokens than asked for.
    model = draft.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    blob = TokenizerSpec(blob=store.put(tokenizer_json))
    return with_initial_state(draft.model_copy(update={"model": model, "tokenizer": blob, "data": data}))


def _draft(request: RunRequest) -> Manifest:
    """The manifest with nothing in the place of its hashes: whatever is wrong with the settings shows here, before any work."""
    if request.model not in PRESETS:
        raise UserError(f"no model preset {request.model!r}; choose one of {', '.join(PRESETS)}")
    overrides, preset = dict(request.overrides or {}), PRESETS[request.model]
    fields = {name: getattr(preset, name) for name in ModelSpec.model_fields}
    kind: Literal["files", "stdlib", "local"] = "files"
    if request.data in ("stdlib", "local"):
        kind = "stdlib" if request.data == "stdlib" else "local"
    try:
        model = ModelSpec(**fields | _section(overrides, "model"))
        sequence_tokens = min(model.max_sequence_tokens, 1024)
        inner = {
            "lr": LEARNING_RATES.get(request.model, DEFAULT_LEARNING_RATE),
            "optimizer": "muon" if model.hidden_size <= MUON_WIDTH else "adamw",
            "sequence_tokens": sequence_tokens,
        }
        index = None if kind == "local" else NO_HASH
        draft = Manifest(
            name=request.name,
            organiser=request.organiser,
            model=model,
            tokenizer=TokenizerSpec(blob=NO_HASH),
            data=DataSpec(
                kind=kind, index=index, heldout=NO_HASH, heldout_tokens=request.heldout_tokens, train_tokens=0
            ),
            inner=InnerSpec(**inner | _section(overrides, "inner")),
            sync=SyncSpec(**_section(overrides, "sync")),
            safety=SafetySpec(**_section(overrides, "safety")),
            pipeline=PipelineSpec(**_section(overrides, "pipeline")),
            initial_state=InitialStateSpec(seed=request.seed, sha256=NO_HASH),
        )
    except ValidationError as error:
        raise _user_error(error) from None
    if overrides:
        raise UserError(f"unknown setting {next(iter(overrides))!r}; settings are named like sync.alpha or inner.lr")
    return draft


def with_initial_state(manifest: Manifest) -> Manifest:
    """The same manifest with the hash of the initial weights that its model and seed give."""
    seed = manifest.initial_state.seed
    state = InitialStateSpec(seed=seed, sha256=initial_sha256(model_config(manifest), seed))
    return manifest.model_copy(update={"initial_state": state})


def _texts(request: RunRequest) -> Iterator[str]:
    if request.data == "local" and request.heldout is None:
        raise UserError("a run on volunteers' own files needs a held-out set: name a folder of text with --heldout")
    folder = request.heldout if request.data == "local" else Path(request.data)
    try:
        documents = iter_stdlib() if request.data == "stdlib" else iter_files(folder or Path())
        left = request.max_chars or None
        for text in documents:
            yield text
            if left is not None and (left := left - len(text)) <= 0:
                return
    except DataError as error:
        raise UserError(str(error)) from None


def _store_data(draft: Manifest, texts: Iterable[str], tokenizer: Tokenizer, store: BlobStore) -> DataSpec:
    kind = draft.data.kind
    try:
        shards, heldout = build_dataset(
            texts, tokenizer, shard_tokens=SHARD_TOKENS, heldout_tokens=draft.data.heldout_tokens
        )
    except DataError as error:
        raise UserError(str(error)) from None
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    heldout_tokens = len(heldout) // width
    if kind == "local":
        return DataSpec(kind=kind, heldout=store.put(heldout), heldout_tokens=heldout_tokens, train_tokens=0)
    # What is left at the end may be too short for a sequence: nobody could train on it.
    whole = (shard for shard in shards if len(shard) // width > draft.inner.sequence_tokens)
    entries = [(str(store.put(shard)), len(shard) // width) for shard in whole]
    if not entries:
        raise UserError("the data holds too little text for both training and a held-out set; add more files")
    return DataSpec(
        kind=kind,
        index=store.put(ShardIndex(tuple(entries)).pack()),
        heldout=store.put(heldout),
        heldout_tokens=heldout_tokens,
        train_tokens=sum(tokens for _, tokens in entries),
    )


def _section(overrides: dict[str, Any], section: str) -> dict[str, Any]:
    """Take the overrides of one section out of `overrides`."""
    names = [name for name in overrides if name.startswith(section + ".")]
    return {name.split(".", 1)[1]: overrides.pop(name) for name in names}


def _user_error(error: ValidationError) -> UserError:
    problem = error.errors(include_url=False, include_input=False)[0]
    section = [] if error.title == "Manifest" else [error.title.removesuffix("Spec").lower()]
    where = ".".join([*section, *map(str, problem["loc"])])
    return UserError(f"setting {where}: {problem['msg'].removeprefix('Value error, ')}".replace("setting : ", ""))
