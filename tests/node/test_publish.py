"""Making runs: what an organiser may ask for, and what comes back when it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.data import ShardIndex
from model.errors import DataError
from node.publish import RunRequest, make_run, with_initial_state
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.ids import BlobId
from protocol.manifest import Manifest
from tests.node.runs import ORGANISER, TINY, write_corpus


def request(folder: Path, *, settings: dict[str, Any] | None = None, **changes: Any) -> RunRequest:
    fields: dict[str, Any] = {
        "name": "tiny",
        "organiser": ORGANISER.peer_id,
        "model": "1m",
        "data": str(folder),
        "heldout_tokens": 512,
    }
    return RunRequest(**fields | {"overrides": TINY | (settings or {})} | changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def test_the_same_request_gives_the_same_run(corpus: Path, store: BlobStore, tmp_path: Path) -> None:
    first = make_run(request(corpus), store)
    again = make_run(request(corpus), BlobStore(tmp_path / "elsewhere"))
    assert first.run_id == again.run_id
    other = make_run(request(corpus, seed=1), store)
    assert other.initial_state != first.initial_state
    assert other.data == first.data


def test_everything_that_the_manifest_names_is_stored(corpus: Path, store: BlobStore) -> None:
    made = make_run(request(corpus), store)
    assert made.data.index is not None
    index = ShardIndex.unpack(store.read(BlobId(made.data.index)))
    assert index.num_tokens == made.data.train_tokens
    named = {made.tokenizer.blob, made.data.index, made.data.heldout, *(blob for blob, _ in index.entries)}
    assert set(store.blobs()) == named


def test_a_rest_too_short_for_a_sequence_is_left_out(
    corpus: Path, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run(request(corpus), store)
    sequence = whole.inner.sequence_tokens
    shard_tokens = whole.data.train_tokens - sequence
    monkeypatch.setattr("node.publish.SHARD_TOKENS", shard_tokens)
    made = make_run(request(corpus), store)
    assert made.data.train_tokens == shard_tokens
    monkeypatch.setattr("node.publish.SHARD_TOKENS", sequence)
    with pytest.raises(UserError, match="too little text"):
        make_run(request(corpus), store)


def test_narrow_models_are_trained_by_muon_and_the_organiser_has_the_last_word(corpus: Path, store: BlobStore) -> None:
    assert make_run(request(corpus), store).inner.optimizer == "muon"
    wide = {"model.hidden_size": 1088, "model.num_heads": 17, "model.num_kv_heads": 17, "model.num_layers": 1}
    assert make_run(request(corpus, settings=wide), store).inner.optimizer == "adamw"
    assert make_run(request(corpus, settings={"inner.optimizer": "adamw"}), store).inner.optimizer == "adamw"


def test_the_file_reads_back_to_the_same_run(corpus: Path, store: BlobStore) -> None:
    made = make_run(request(corpus), store)
    assert Manifest.from_toml(made.to_toml()).run_id == made.run_id
    assert with_initial_state(made) == made


def test_a_local_run_stores_only_what_all_share(corpus: Path, store: BlobStore) -> None:
    made = make_run(request(corpus, data="local", heldout=corpus), store)
    assert made.data.kind == "local"
    assert made.data.index is None
    assert len(store.blobs()) == 2


def test_text_can_be_limited(corpus: Path, store: BlobStore) -> None:
    whole, part = make_run(request(corpus), store), make_run(request(corpus, max_chars=20_000), store)
    assert 0 < part.data.train_tokens < whole.data.train_tokens


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sync.gamma": 1.9}, "sync.gamma 1.9 is outside"),
        ({"sync.alpha": 0.9, "sync.gamma": 0.7}, "lower gamma or alpha"),
        ({"sync.alpha": "half"}, "setting sync.alpha: "),
        ({"sync.momentum": 0.5}, "momentum"),
        ({"model.num_heads": 3}, "setting model: hidden_size 32 is not divisible by num_heads 3"),
        ({"model.num_kv_heads": 0}, "setting model.num_kv_heads: "),
        ({"model.hidden_size": 10**9}, "hidden_size"),
        ({"model.vocab_size": "many"}, "vocab_size"),
        ({"model.vocab_size": 10**9}, "vocab_size"),
        ({"model.vocab_size": 3}, "vocab"),
        ({"inner.min_sequences": 9, "inner.max_sequences": 8}, "min_sequences"),
        ({"inner.sequence_tokens": 65}, "inner.sequence_tokens must not exceed model.max_sequence_tokens"),
        ({"safety.history": 0}, "history"),
        ({"weather.sun": True}, "weather.sun"),
        ({"model.vocab_size": None}, "vocab_size"),
        ({"inner.lr": float("nan")}, "lr"),
    ],
)
def test_settings_that_cannot_be(corpus: Path, store: BlobStore, settings: dict[str, Any], told: str) -> None:
    with pytest.raises((UserError, DataError)) as caught:
        make_run(request(corpus, settings=settings), store)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "Big", "a b", "../x", "a" * 65, "ü"])
def test_names_that_cannot_be(corpus: Path, store: BlobStore, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        make_run(request(corpus, name=name), store)


def test_an_unknown_preset(corpus: Path, store: BlobStore) -> None:
    with pytest.raises(UserError, match="choose one of 1m"):
        make_run(request(corpus, model="9m"), store)


@pytest.mark.parametrize("kind", ["missing", "a file", "empty", "not text", "too little"])
def test_data_that_cannot_be(store: BlobStore, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    if kind == "a file":
        folder.write_text("text")
    elif kind != "missing":
        folder.mkdir()
    if kind == "not text":
        (folder / "noise.txt").write_bytes(bytes(range(256)) * 100)
    if kind == "too little":
        (folder / "short.txt").write_text("a few words\n" * 40)
    with pytest.raises((UserError, DataError)) as caught:
        make_run(request(folder), store)
    assert "\n" not in str(caught.value)
    assert ("add" if kind == "too little" else "data") in str(caught.value)
    assert store.blobs() == []


def test_a_local_run_needs_a_heldout_set(store: BlobStore) -> None:
    with pytest.raises(UserError, match="--heldout"):
        make_run(request(Path("local")), store)


@pytest.mark.parametrize("heldout_tokens", [0, 16, 10**9])
def test_a_heldout_set_of_an_impossible_size(corpus: Path, store: BlobStore, heldout_tokens: int) -> None:
    with pytest.raises((UserError, DataError)) as caught:
        make_run(request(corpus, heldout_tokens=heldout_tokens), store)
    assert "\n" not in str(caught.value)


def test_a_full_disk(corpus: Path, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(UserError, match="No space left on device; free space"):
        make_run(request(corpus), store)
    assert store.blobs() == []
