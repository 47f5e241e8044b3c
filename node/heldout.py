"""The held-out set, measured whole or by a rotating part of it.

Measuring all of it takes a slow machine 11 s (32k tokens at 3k tokens/s forward), which is a fifth of a round of 60 s. So a round
measures only a few pieces, spread over the set and others every time. Texts differ in difficulty far more than a round of
training changes anything, so the mean of a few pieces would jump about. What is compared is each piece with itself:

    estimate = loss of the whole set when it was last measured + mean over the pieces of (loss now − loss then)

The estimate has the expectation of the whole set's loss (the pieces take turns, none is preferred), so it stands beside whole
measurements on the same axis. Its error is what the pieces changed more or less than the rest did since then.

Why not always the same pieces: their own bias would stay in the curve until the next whole measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.batches import heldout_batches
from model.data import Tokens

__all__ = ["Heldout"]

PIECE_SEQUENCES = 4
"""Windows per piece: one forward pass. Small, since a slow machine can afford only one or two per round. They lie far apart, as
neighbours belong to one document and say nearly the same."""
GOLDEN = 0.6180339887498949
"""Multiples of it modulo 1 fill the interval evenly however many are taken: the pieces' order."""


class Heldout:
    """A held-out set cut into pieces, and the loss of each when the whole was last measured.

    Args:
        tokens: the set [T].
        sequence_tokens: length of a window.

    Raises:
        DataError: less than one window (from the first measurement).
    """

    def __init__(self, tokens: Tokens, *, sequence_tokens: int) -> None:
        self._tokens, self._sequence_tokens = tokens, sequence_tokens
        self._num_windows = (tokens.size - 1) // sequence_tokens
        self.num_pieces = max(1, -(-self._num_windows // PIECE_SEQUENCES))
        self._order = sorted(range(self.num_pieces), key=lambda piece: piece * GOLDEN % 1.0)
        self._turn = 0
        self._then: dict[int, float] = {}

    @property
    def is_measured(self) -> bool:
        """Whether the whole has been measured, which an estimate needs."""
        return bool(self._then)

    def whole(self, loss_of: Callable[[Tensor], Tensor], *, remember: bool = False) -> float:
        """Mean loss over the whole set in nats per token.

        Args:
            loss_of: mean loss of a batch int64 [≤ PIECE_SEQUENCES, sequence_tokens + 1].
            remember: compare the estimates that follow with this measurement, if it is finite.
        """
        sizes, losses = self._measure(range(self.num_pieces), loss_of)
        if remember and all(map(math.isfinite, losses.values())):
            self._then = losses
        return _mean(losses, sizes)

    def estimate(self, loss_of: Callable[[Tensor], Tensor], *, num_pieces: int) -> float:
        """The same mean, estimated from the next `num_pieces` pieces in turn.

        Returns:
            nats per token; exact when all pieces are asked for.
        """
        assert self._then, "an estimate needs a whole measurement before it"
        num_pieces = min(num_pieces, self.num_pieces)
        turns = range(self._turn, self._turn + num_pieces)
        self._turn = turns.stop % self.num_pieces
        sizes, losses = self._measure([self._order[turn % self.num_pieces] for turn in turns], loss_of)
        if num_pieces == self.num_pieces:
            return _mean(losses, sizes)
        every_size = {piece: self._size(piece) for piece in self._then}
        return _mean(self._then, every_size) + _mean({p: losses[p] - self._then[p] for p in losses}, sizes)

    def _measure(
        self, pieces: Sequence[int], loss_of: Callable[[Tensor], Tensor]
    ) -> tuple[dict[int, int], dict[int, float]]:
        """Windows and mean loss of each piece."""
        sizes, losses = {}, {}
        for piece in pieces:
            batch = self._piece(piece)
            sizes[piece], losses[piece] = len(batch), float(loss_of(batch))
        return sizes, losses

    def _size(self, piece: int) -> int:
        return len(range(piece, self._num_windows, self.num_pieces))

    def _piece(self, piece: int) -> Tensor:
        length, windows = self._sequence_tokens, range(piece, max(1, self._num_windows), self.num_pieces)
        parts = [self._tokens[window * length : (window + 1) * length + 1] for window in windows]
        return torch.cat([next(heldout_batches(part, sequence_tokens=length, num_sequences=1)) for part in parts])


def _mean(values: dict[int, float], weights: dict[int, int]) -> float:
    return sum(values[key] * weights[key] for key in values) / sum(weights[key] for key in values)
