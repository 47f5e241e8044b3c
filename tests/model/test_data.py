"""Data sets, the shard index and shard assignment."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data import ShardIndex, assigned_shard, build_dataset, decode_tokens, token_dtype
from model.errors import DataError
from model.tokenizer import Tokenizer, train_tokenizer
from tests.model.shapes import TEXTS

TOKENIZER = Tokenizer(train_tokenizer(TEXTS, 400))
INDEX = ShardIndex((("ab" * 32, 7), ("cd" * 32, 1 << 40)))


def documents_of(data: bytes) -> list[str]:
    tokens = decode_tokens(data, 400)
    ends = np.flatnonzero(tokens == TOKENIZER.eot_id)
    return [TOKENIZER.decode(part[part != TOKENIZER.eot_id].tolist()) for part in np.split(tokens, ends + 1)]


def test_all_text_is_in_either_shards_or_heldout() -> None:
    dataset = build_dataset(TEXTS, TOKENIZER, shard_tokens=1000, heldout_tokens=2500)
    shards = list(dataset.shards)
    assert len(dataset.heldout) == 2 * 2500
    assert {len(shard) for shard in shards[:-1]} == {2000}
    assert 0 < len(shards[-1]) <= 2000
    trained, heldout = documents_of(b"".join(shards)), documents_of(dataset.heldout)
    assert trained.pop() == ""  # training text ends with an end-of-text token
    whole = heldout[:-1]
    assert len(whole) >= 4
    assert set(whole) | set(trained) <= set(TEXTS)
    assert not set(heldout) & set(trained)
    assert len(trained) + len(heldout) == len(TEXTS)


def test_order_of_the_documents_does_not_matter() -> None:
    def build(texts: list[str]) -> tuple[list[bytes], bytes]:
        dataset = build_dataset(iter(texts), TOKENIZER, shard_tokens=1000, heldout_tokens=2500)
        return list(dataset.shards), dataset.heldout

    assert build(TEXTS) == build(TEXTS[::-1])


def test_duplicates_of_heldout_documents_are_not_trained_on() -> None:
    dataset = build_dataset(TEXTS * 3, TOKENIZER, shard_tokens=1000, heldout_tokens=2500)
    heldout = documents_of(dataset.heldout)
    assert len(heldout) == len(set(heldout))
    assert not set(heldout) & set(documents_of(b"".join(dataset.shards)))


def test_short_documents_are_held_out_before_long_ones() -> None:
    long_text = "".join(TEXTS)
    dataset = build_dataset([long_text, *TEXTS[:40]], TOKENIZER, shard_tokens=1000, heldout_tokens=1000)
    assert long_text in documents_of(b"".join(dataset.shards))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="add text"):
        build_dataset(TEXTS[:2], TOKENIZER, shard_tokens=1000, heldout_tokens=2500)
    with pytest.raises(DataError, match="add text"):
        build_dataset([], TOKENIZER, shard_tokens=1000, heldout_tokens=17)


@pytest.mark.parametrize(("vocab_size", "kind"), [(1024, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_stored_type(vocab_size: int, kind: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(kind)


def test_token_bytes_are_checked() -> None:
    data = np.array([0, 399, 400], dtype="<u2").tobytes()
    assert decode_tokens(data, 401).tolist() == [0, 399, 400]
    with pytest.raises(DataError, match="outside"):
        decode_tokens(data, 400)
    with pytest.raises(DataError, match="cut off"):
        decode_tokens(data[:-1], 401)
    assert decode_tokens(b"", 400).size == 0


def test_index_round_trip() -> None:
    assert ShardIndex.unpack(INDEX.pack()) == INDEX
    assert INDEX.num_tokens == 7 + (1 << 40)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        INDEX.pack()[:-1],
        INDEX.pack() + b"\0",
        b"x" + INDEX.pack()[1:],
        INDEX.pack()[:16] + b"\0\0\0\0",
        INDEX.pack()[:16] + b"\xff\xff\xff\xff" + INDEX.pack()[20:],
        INDEX.pack()[:-8] + bytes(8),
    ],
)
def test_bad_index_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="index"):
        ShardIndex.unpack(data)


@given(st.binary(max_size=200), st.integers(0, 99), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_index_decoder_only_raises_data_errors(noise: bytes, where: int, value: int) -> None:
    packed = bytearray(INDEX.pack())
    packed[where] = value
    for data in (noise, bytes(packed), INDEX.pack()[:20] + noise):
        try:
            index = ShardIndex.unpack(data)
        except DataError:
            continue
        assert index.pack() == data


def test_assignment_is_fixed_and_even() -> None:
    # Written down once: changing it changes what every peer of a published run reads.
    assert assigned_shard("run", "peer", 3, 0, 1000) == 968
    drawn = Counter(assigned_shard("run", f"peer{i}", r, 0, 8) for i in range(20) for r in range(100))
    assert set(drawn) == set(range(8))
    assert max(drawn.values()) < 1.25 * 2000 / 8
    assert len({assigned_shard("run", "peer", 3, draw, 1 << 30) for draw in range(50)}) == 50
