"""Training and held-out batches from an array of tokens.

Training goes through the shard's windows in a random order, each once, then again in another order and shifted by another
offset. The order comes from Philox raw bits keyed by seed and epoch, so the cursor (windows handed out) is the whole state: saved
in a checkpoint, it resumes exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.data import Tokens
from model.errors import DataError

__all__ = ["RoundBatches", "heldout_batches"]


class RoundBatches:
    """Random windows of a shard.

    Args:
        tokens: the shard.
        seed: chooses the order.
        sequence_tokens: T; a window has T + 1 tokens.

    Raises:
        DataError: the shard is shorter than one window.
    """

    def __init__(self, tokens: Tokens, *, seed: int, sequence_tokens: int) -> None:
        if tokens.size <= sequence_tokens:
            raise DataError(f"a shard of {tokens.size} tokens is too short for sequences of {sequence_tokens}")
        self._tokens = tokens
        self._seed = seed
        self._sequence_tokens = sequence_tokens
        # One window fewer than fit leaves room for the epoch's offset, so that every epoch cuts elsewhere.
        self.num_sequences = max(1, (tokens.size - 1) // sequence_tokens - 1)
        self.cursor = 0
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    @property
    def epoch(self) -> float:
        """How often the shard has been gone through."""
        return self.cursor / self.num_sequences

    def next(self, num_sequences: int) -> Tensor:
        """The next windows, int64 [num_sequences, T + 1]."""
        starts = np.fromiter((self._start(self.cursor + i) for i in range(num_sequences)), np.int64, num_sequences)
        self.cursor += num_sequences
        return _windows(self._tokens, starts, self._sequence_tokens)

    def _start(self, sequence: int) -> int:
        epoch, position = divmod(sequence, self.num_sequences)
        if epoch != self._epoch:
            self._epoch, self._starts = epoch, self._order(epoch)
        return int(self._starts[position])

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        key = hashlib.sha256(f"llm-node:order\0{self._seed}\0{epoch}".encode()).digest()[:16]
        words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(self.num_sequences + 1)
        room = self._tokens.size - (self.num_sequences * self._sequence_tokens + 1)
        offset = int(words[-1]) % (min(room, self._sequence_tokens) + 1)
        return np.argsort(words[:-1], kind="stable") * self._sequence_tokens + offset


def heldout_batches(tokens: Tokens, *, sequence_tokens: int, num_sequences: int) -> Iterator[Tensor]:
    """All whole windows of the held-out set in order, each predicted token exactly once.

    Args:
        tokens: the held-out set.
        sequence_tokens: T.
        num_sequences: windows per batch; the last batch may have fewer.

    Yields:
        int64 [≤ num_sequences, T + 1].

    Raises:
        DataError: less than one window.
    """
    if tokens.size <= sequence_tokens:
        raise DataError(f"a held-out set of {tokens.size} tokens is too short for sequences of {sequence_tokens}")
    starts = np.arange((tokens.size - 1) // sequence_tokens, dtype=np.int64) * sequence_tokens
    for first in range(0, starts.size, num_sequences):
        yield _windows(tokens, starts[first : first + num_sequences], sequence_tokens)


def _windows(tokens: Tokens, starts: npt.NDArray[np.int64], sequence_tokens: int) -> Tensor:
    where = starts[:, None] + np.arange(sequence_tokens + 1, dtype=np.int64)
    return torch.from_numpy(tokens[where].astype(np.int64))
