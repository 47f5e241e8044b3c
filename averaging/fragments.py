"""Which part of the flat vectors a round exchanges: fragment r mod F of F in round r (streaming DiLoCo, arXiv 2501.18512).

    stripe 0 | stripe 1 | stripe 2 | stripe 3 | …        fragment f holds the stripes i with i mod F = f, one after another

Every F rounds each fragment is exchanged once, so a round moves 1/F of the bytes. The stripes are spread over the whole vector, so
that all fragments see all layers. A stripe is a whole number of blocks of every codec (4096 elements), thus a fragment is
encoded exactly as the same elements of the whole vector would be; only the model's last stripe may be shorter. With F = 1
there is one stripe, the whole vector.

The stripe length follows from the model's size and F alone (it is part of the wire format): about 16 stripes per fragment, so that
fragments differ by a few per cent at most, and never above 2²⁰ elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from protocol.sync_spec import FRAGMENT_BLOCK

__all__ = ["Fragments", "Piece"]

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

    Raises:
        ValueError: the vector has fewer than F blocks, so that a fragment would be empty.
    """

    def __init__(self, numel: int, num_fragments: int) -> None:
        if num_fragments > 1 and numel <= (num_fragments - 1) * FRAGMENT_BLOCK:
            raise ValueError(
                f"{numel} parameters are too few for {num_fragments} fragments of blocks of {FRAGMENT_BLOCK}; lower fragments"
            )
        self._numel = numel
        self.num_fragments = num_fragments
        blocks_per_stripe = numel // (num_fragments * _STRIPES_PER_FRAGMENT * FRAGMENT_BLOCK)
        stripe = min(max(blocks_per_stripe, 1) * FRAGMENT_BLOCK, _MAX_STRIPE_NUMEL)
        self.stripe_numel = stripe if num_fragments > 1 else numel

    def index(self, round: int) -> int:
        """The fragment that is exchanged in a round."""
        return round % self.num_fragments

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
        step = self.num_fragments * self.stripe_numel
        for begin in range(fragment * self.stripe_numel, self._numel, step):
            yield slice(begin, min(begin + self.stripe_numel, self._numel))
