"""Which part of the flat vectors a round exchanges: fragment r mod F of F in round r (streaming DiLoCo, arXiv 2501.18512).

    stripe 0 | stripe 1 | stripe 2 | stripe 3 | …        fragment f holds the stripes i with i mod F = f, one after another

Every F rounds each fragment is exchanged once, so a round moves 1/F of the bytes. The stripes are spread over the whole vector, so
that all fragments see all layers. A stripe is a whole number of blocks of every codec (4096 elements), thus a fragment is
encoded exactly as the same elements of the whole vector would be; only the model's last stripe may be shorter. With F = 1
there is one stripe, the whole vector.

Fragments may also be drawn at random (sparse continuous averaging, the idea known as SPARTA): round r then exchanges, of S
stripes, the ⌈S / F⌉ whose SHA-256 of "llm-node:random-fragment", r and their number is smallest. Both ends draw alike, since
nothing but the round decides; with few steps per round a random small share of the weights is averaged all the time.

The stripe length follows from the model's size and F alone (it is part of the wire format): about 16 stripes per fragment, so that
fragments differ by a few per cent at most, and never above 2²⁰ elements.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from protocol.sync_spec import FRAGMENT_BLOCK

__all__ = ["Choice", "Fragments", "Piece"]

Choice = Literal["turn", "random"]

_STRIPES_PER_FRAGMENT = 16
_MAX_STRIPE_NUMEL = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of elements that is worked on at once.

    Args:
        span: where it lies in θ, φ, δ, the residual and the anchor.
        start: where it begins in the fragment's own vector, the one that is encoded.
    """

    span: slice
    start: int


class Fragments:
    """The division of a vector into F fragments.

    Args:
        numel: elements of the whole vector.
        num_fragments: F.
        choice: whether fragments take turns or are drawn.

    Raises:
        ValueError: the vector has fewer than F blocks, so that a fragment would be empty.
    """

    def __init__(self, numel: int, num_fragments: int, *, choice: Choice = "turn") -> None:
        if num_fragments > 1 and numel <= (num_fragments - 1) * FRAGMENT_BLOCK:
            raise ValueError(
                f"{numel} parameters are too few for {num_fragments} fragments of blocks of {FRAGMENT_BLOCK}; lower fragments"
            )
        self._numel = numel
        self.num_fragments = num_fragments
        blocks_per_stripe = numel // (num_fragments * _STRIPES_PER_FRAGMENT * FRAGMENT_BLOCK)
        stripe = min(max(blocks_per_stripe, 1) * FRAGMENT_BLOCK, _MAX_STRIPE_NUMEL)
        self.stripe_numel = stripe if num_fragments > 1 else numel
        self._is_random = choice == "random"
        self._num_stripes = -(-numel // self.stripe_numel)

    def index(self, round: int) -> int:
        """The fragment that is exchanged in a round. Those drawn at random are named by their round."""
        return round if self._is_random else round % self.num_fragments

    def is_same(self, round: int, other_round: int) -> bool:
        """Whether two rounds exchange the same elements."""
        return self.index(round) == self.index(other_round)

    @property
    def max_numel(self) -> int:
        """Elements of the longest fragment."""
        return min(self._num_drawn * self.stripe_numel, self._numel) if self._is_random else self.numel(0)

    def numel(self, fragment: int) -> int:
        """Elements of one fragment."""
        return sum(span.stop - span.start for span in self._stripes(fragment))

    def pieces(self, fragment: int, *, max_numel: int) -> Iterator[Piece]:
        """The fragment in order, in pieces of at most `max_numel` elements (a multiple of 4096, or the whole vector)."""
        start = 0
        for stripe in self._stripes(fragment):
            for begin in range(stripe.start, stripe.stop, max_numel):
                end = min(begin + max_numel, stripe.stop)
                yield Piece(slice(begin, end), start)
                start += end - begin

    def _stripes(self, fragment: int) -> Iterator[slice]:
        if self._is_random:
            numbers: Sequence[int] = _drawn(fragment, num_stripes=self._num_stripes, num_drawn=self._num_drawn)
        else:
            numbers = range(fragment, self._num_stripes, self.num_fragments)
        for number in numbers:
            begin = number * self.stripe_numel
            yield slice(begin, min(begin + self.stripe_numel, self._numel))

    @property
    def _num_drawn(self) -> int:
        return -(-self._num_stripes // self.num_fragments)


@lru_cache(maxsize=4)
def _drawn(round: int, *, num_stripes: int, num_drawn: int) -> list[int]:
    """The stripes of a random fragment, in order. Only a round's last one can be short, so all begin at whole blocks."""

    def lot(number: int) -> bytes:
        return hashlib.sha256(b"llm-node:random-fragment\0%d\0%d" % (round, number)).digest()

    return sorted(sorted(range(num_stripes), key=lot)[:num_drawn])
