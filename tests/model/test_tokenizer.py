"""Training and loading tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.corpus import iter_stdlib, sample_texts
from model.errors import DataError
from model.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from tests.model.shapes import TEXTS

DATA = train_tokenizer(TEXTS, 400)
TOKENIZER = Tokenizer(DATA)


def test_vocabulary_is_exact_and_used() -> None:
    assert TOKENIZER.vocab_size == 400
    assert 0 <= TOKENIZER.eot_id < 400
    ids = TOKENIZER.encode(TEXTS[3])
    assert len(ids) < 0.6 * len(TEXTS[3].encode())
    assert TOKENIZER.eot_id not in ids
    assert TOKENIZER.encode_many(TEXTS[:5]) == [TOKENIZER.encode(text) for text in TEXTS[:5]]


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_every_text_comes_back(text: str) -> None:
    if END_OF_TEXT not in text:
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_training_is_deterministic_across_processes_and_thread_counts() -> None:
    code = (
        "import hashlib; from model.tokenizer import train_tokenizer; from tests.model.shapes import TEXTS;"
        "print(hashlib.sha256(train_tokenizer(TEXTS, 400)).hexdigest())"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "5"}
    run = subprocess.run(  # a fresh process: hash seeds and thread pools are per process
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=50
    )
    assert run.stdout.strip() == hashlib.sha256(DATA).hexdigest()


def test_training_twice_on_real_text_gives_the_same_bytes() -> None:
    sample = sample_texts(list(iter_stdlib(max_chars=1 << 20)), 1 << 20)
    assert train_tokenizer(sample, 1024) == train_tokenizer(sample, 1024)


@pytest.mark.parametrize("vocab_size", [257, 60_000])
def test_a_vocabulary_the_text_can_not_give_is_refused(vocab_size: int) -> None:
    with pytest.raises(DataError, match="token"):
        train_tokenizer(TEXTS[:3], vocab_size)


def _without_end_of_text() -> bytes:
    document = json.loads(DATA)
    document["added_tokens"] = []
    document["model"]["vocab"]["<other>"] = document["model"]["vocab"].pop(END_OF_TEXT)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"\xff\xfe\x00", DATA[:-20], b"[" * 100_000, _without_end_of_text(), b" " * (33 << 20)],
    ids=["empty", "no model", "not text", "cut off", "deep", "no end of text", "too long"],
)
def test_bad_bytes_give_one_line(data: bytes) -> None:
    with pytest.raises(DataError) as caught:
        Tokenizer(data)
    assert "\n" not in str(caught.value)
