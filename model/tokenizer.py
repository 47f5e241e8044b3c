"""Text to tokens and back: byte-level BPE by the `tokenizers` library.

Byte-level means that every text has an encoding and nothing is unknown. A run's tokenizer is the bytes of one `tokenizer.json`,
trained once by the organiser; peers fetch them by hash. Training is deterministic: the same texts give the same bytes, whatever
the number of threads, so an organiser who repeats `init` gets the same run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.errors import DataError

__all__ = ["END_OF_TEXT", "MAX_TOKENIZER_BYTES", "Tokenizer", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
MAX_TOKENIZER_BYTES = 32 << 20
_MIN_VOCAB = 258


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a tokenizer.

    Args:
        texts: a few megabytes of what the model will read (see `model.corpus.sample_texts`).
        vocab_size: exact number of tokens: the end-of-text token, 256 bytes and the merges.

    Returns:
        The bytes of `tokenizer.json`.

    Raises:
        DataError: the vocabulary is impossibly small, or the texts are too few to fill it.
    """
    if vocab_size < _MIN_VOCAB:
        raise DataError(f"vocab_size {vocab_size} is too small; a byte-level tokenizer needs at least {_MIN_VOCAB}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise DataError(f"the text gives only {found} of {vocab_size} tokens; add text or lower model.vocab_size")
    data: str = tokenizer.to_str()
    return data.encode()


class Tokenizer:
    """A loaded tokenizer.

    Args:
        data: the bytes of a `tokenizer.json`.

    Raises:
        DataError: too long, unreadable, without an end-of-text token, or with gaps in its ids.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) > MAX_TOKENIZER_BYTES:
            raise DataError(f"tokenizer.json has {len(data)} bytes, more than {MAX_TOKENIZER_BYTES}; use a smaller one")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except ValueError:
            raise DataError("tokenizer.json can not be read; train it again or fetch it again") from None
        ids = self._tokenizer.get_vocab().values()
        eot_id = self._tokenizer.token_to_id(END_OF_TEXT)
        if eot_id is None or len(ids) != max(ids) + 1:
            raise DataError(f"tokenizer.json has no {END_OF_TEXT} token or gaps in its ids; train it again")
        self.vocab_size = len(ids)
        self.eot_id: int = eot_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added at its ends."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text, on all cores."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without end-of-text tokens; incomplete UTF-8 shows as U+FFFD."""
        text: str = self._tokenizer.decode(list(tokens))
        return text
