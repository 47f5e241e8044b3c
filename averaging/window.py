"""How wide a window the lattice codec needs: wider than two replicas are apart, and no wider, since its 4 bits are spread over it.

The codec's window is a multiple of the motion that it is given per element. Here that is an estimate, block by block, of how far
partners are from us. It starts as twice what the block moved in a round, the larger of rms(Δ) and rms(δ), which is all that is
known in the first round (with once as much, a fifth of the blocks of replicas without common progress could not be read), and
never goes below what it moved. How far replicas are apart in such units depends on the run (common or private
progress, lost exchanges, a partition) and on the layer. A fixed multiple that is too small loses the partner for ever: blocks
can not be read, so nothing pulls the replicas together, so they drift further apart (measured: at 5·rms(δ) all exchanges fail
when half of the progress is private). So the estimate follows what was found:

    could be read             d ← max(1.7·rms(theirs − ours), 0.8·d), at most 2·d
    could not be read         d ← max(2·theirs, 0.8·d), at most 2·d; `theirs` is the d that the partner's step tells
    hardly any block          d ← 2·d, everywhere
    nobody to average with    d ← d + what the block moves in the next round

That an update can not be read says that ITS window was too small, hence the second line. Doubling at most, and forgetting by 0.8,
bounds what liars can do: below a quarter of the partners they can not hold the window open. d is kept between 2⁻¹² and 1 times
rms(φ): finer than bfloat16 can be at the one end, wide enough for every partner at the other.

Measured with 8 noloco replicas in random pairs: spread of φ after 60 rounds (bf16 / q4 / lattice) with all progress private
2.70 / 3.59 / 3.23, with half of it 1.91 / 3.84 / 2.31, a twentieth 0.61 / 3.96 / 0.84; at most 1.5 % of the blocks unreadable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from averaging.fragments import Piece
from kernels.formats import LATTICE
from kernels.lattice import WINDOW, lattice_fields

__all__ = ["LatticeWindow"]

_BLOCK = LATTICE.block_size
_LEVELS = 16
_HEADROOM = 1.7
_FORGETTING = 0.8
_GROWTH = 2.0
_FIRST = 2.0
_SMALLEST = 2.0**-12


class LatticeWindow:
    """Distances to partners, one per block of 256.

    Args:
        num_parameters: length of the whole vectors.
        num_fragments: F.
        device: where they are.
    """

    def __init__(self, num_parameters: int, *, num_fragments: int, device: torch.device) -> None:
        self.distance = torch.zeros(-(-num_parameters // _BLOCK), device=device)
        """d, fp32 [blocks]; part of the replica's state."""
        self.drift = torch.zeros(num_fragments, device=device)
        """Per fragment 1 after a round without a partner, else 0; part of the state, too."""

    def motion(self, piece: Piece, x: Tensor, moved: tuple[Tensor, ...], *, round: int, out: Tensor) -> Tensor:
        """The motion to encode a piece with; d rises to what the piece moved.

        Args:
            round: whose fragment the piece is of.
            x: what is encoded, fp32 [n].
            moved: Δ, and δ where it moves x, fp32 [n] each.
            out: fp32 [n], written and returned.
        """
        distance, size = self._blocks(piece), _rms(x)
        largest = _rms(moved[0])
        for vector in moved[1:]:
            largest = torch.fmax(largest, _rms(vector))
        distance.copy_(self.wanted(distance, moved=largest, size=size, drift=self.drift_of(round)))
        full = x.numel() // _BLOCK
        out[: full * _BLOCK].view(full, _BLOCK).copy_(distance[:full, None])
        if tail := x.numel() % _BLOCK:
            out[full * _BLOCK :] = distance[full] * math.sqrt(_BLOCK / tail)  # the codec pads its rms with zeros
        return out

    def learn(self, piece: Piece, payload: Tensor, *, difference: Tensor, unreadable: Tensor | None) -> None:
        """Follow what an accepted partner's payload showed.

        Args:
            payload: the whole payload, uint8.
            difference: theirs − ours as decoded, fp32 [n].
            unreadable: where the decoded value is our own, bool [n]; a block of nothing else could not be read. None if
                everything could.
        """
        rms = _rms(difference)
        missing = torch.zeros_like(rms, dtype=torch.bool) if unreadable is None else _rms(unreadable.float()) == 1.0
        self.follow(piece, payload, rms=rms, unreadable=missing)

    def follow(self, piece: Piece, payload: Tensor, *, rms: Tensor, unreadable: Tensor) -> None:
        """Like `learn`, from what was found per block: rms(theirs − ours), fp32, and what could not be read, bool; [blocks]."""
        distance = self._blocks(piece)
        first = piece.start // _BLOCK
        steps = lattice_fields(payload)[0][first : first + len(distance), 0].float()
        theirs = steps * (_LEVELS / 2 / WINDOW)
        found = torch.where(unreadable, _GROWTH * theirs, _HEADROOM * rms)
        distance.copy_(torch.minimum(torch.fmax(found, _FORGETTING * distance), _GROWTH * distance))

    @staticmethod
    def wanted(distance: Tensor, *, moved: Tensor, size: Tensor, drift: Tensor) -> Tensor:
        """d for this round, given what the blocks moved and rms(x), fp32 [blocks] each, and the window's `drift`."""
        risen = torch.where(distance > 0.0, torch.maximum(distance + drift * moved, moved), _FIRST * moved)
        bounded = torch.minimum(torch.maximum(risen, _SMALLEST * size), size)
        return torch.where(torch.isfinite(moved + size), bounded, distance)  # a diverged round leaves d as it was

    def drift_of(self, round: int) -> Tensor:
        """`drift` of the fragment of a round, fp32, 0-dimensional."""
        return self.drift[round % len(self.drift)]

    def after_round(self, round: int, *, alone: bool) -> None:
        """A round is over; `alone` says that nobody was averaged with."""
        self.drift_of(round).fill_(float(alone))

    def reset(self) -> None:
        """Forget everything: the weights are new ones."""
        self.distance.zero_()
        self.drift.zero_()

    def widen(self) -> None:
        """A partner was too far to be read at all."""
        self.distance.mul_(_GROWTH)

    def _blocks(self, piece: Piece) -> Tensor:
        return self.distance[piece.span.start // _BLOCK : -(-piece.span.stop // _BLOCK)]


def _rms(x: Tensor) -> Tensor:
    """Root mean square per block, [n] → [blocks]; the last block may be shorter."""
    full = x.numel() // _BLOCK * _BLOCK
    rms: Tensor = torch.linalg.vector_norm(x[:full].view(-1, _BLOCK), dim=1) / math.sqrt(_BLOCK)
    if full == x.numel():
        return rms
    tail = torch.linalg.vector_norm(x[full:]) / math.sqrt(x.numel() - full)
    return torch.cat((rms, tail[None]))
