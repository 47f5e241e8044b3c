"""The passes of every algorithm, tile by tile: each tile fits a core's cache and is worked on by one operation after the other.

Where a partner's decoded value enters, ours enters as decoded from the bytes that WE sent, not as it was: both sides then work with
the same numbers, the mean of φ is conserved whatever the codec, and equal φ give a pull of exactly zero (with the lattice,
whose steps are each peer's own, of a step at most).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from averaging.fragments import Fragments, Piece
from averaging.outer import outer_step
from averaging.partners import Measurement, Partner, TileNorm
from averaging.payloads import Buffers, Payloads
from averaging.replica_config import ReplicaConfig
from averaging.vectors import Passes, Vectors
from kernels.dispatch import tile_numel

__all__ = ["TiledPasses"]


class TiledPasses(Passes):
    """See the module.

    Args:
        vectors: the state, changed in place.
        payloads: codecs and wire buffers.
        fragments: which part a round exchanges.
        config: how the run averages.
    """

    def __init__(self, vectors: Vectors, payloads: Payloads, fragments: Fragments, config: ReplicaConfig) -> None:
        self._vectors, self._payloads, self._fragments, self._config = vectors, payloads, fragments, config
        numel, device = vectors.theta.numel(), vectors.theta.device
        self._tile = min(numel, tile_numel(device))
        self._buffers = [torch.empty(self._tile, device=device) for _ in range(6)]

    def pack(self, round: int) -> float:
        norm, payloads, vectors = TileNorm(), self._payloads, self._vectors
        for piece in self._pieces(round):
            buffers = self._buffers_of(piece)
            delta = torch.sub(vectors.theta[piece.span], vectors.phi[piece.span], out=buffers.mean)
            norm.add(delta)
            if payloads.delta.numel():
                payloads.encode_delta(piece, self._with_residual(piece, delta, buffers.pull), buffers.scratch)
            if payloads.slow.numel():
                slow, momentum = self._slow_vectors(piece.span)
                payloads.encode_slow(piece, slow, buffers, momentum=momentum)
            vectors.anchor[piece.span] = vectors.theta[piece.span]
        return norm.total()

    def measure(self, round: int, partners: Sequence[Partner]) -> list[Measurement]:
        found = [Measurement() for _ in partners]
        pairs = list(zip(partners, found, strict=True))
        for piece in self._pieces(round) if pairs else ():
            self._payloads.measure(piece, self._near(piece.span), self._buffers_of(piece), pairs)
        return found

    def step(
        self, round: int, accepted: Sequence[Partner], *, scale: float, clip: float, keeps_residual: bool
    ) -> float:
        shift = TileNorm()
        for piece in self._pieces(round):
            if keeps_residual and self._vectors.residual.numel():
                self._keep_residual(piece)
            self._step(piece, accepted, scale=scale, clip=clip)
            shift.add(self._correct(piece, moves=self._config.outer.keeps_slow or bool(accepted)))
        return shift.total()

    def step_norm(self, round: int, accepted: Sequence[Partner]) -> float:
        norm = TileNorm()
        for piece in self._pieces(round):
            buffers, pull = self._gather(piece, accepted, learns=False)
            buffers.momentum.copy_(self._vectors.momentum[piece.span])
            outer_step(buffers.step.zero_(), buffers.momentum, buffers.mean, pull, self._config.outer)
            norm.add(buffers.step)
        return norm.total()

    def _with_residual(self, piece: Piece, delta: Tensor, out: Tensor) -> Tensor:
        """Δ + b·e, what is to be encoded."""
        residual = self._vectors.residual
        if not residual.numel():
            return delta
        return torch.add(delta, residual[piece.span], alpha=self._config.error_decay, out=out)

    def _slow_vectors(self, span: slice) -> tuple[Tensor, Tensor | None]:
        """What travels as the slow payload, and the δ that tells how far it moved, if that is what moved it."""
        vectors, outer = self._vectors, self._config.outer
        if outer.slow_is_theta:
            return vectors.theta[span], None
        return vectors.phi[span], vectors.momentum[span] if outer.has_momentum else None

    def _near(self, span: slice) -> Tensor:
        """What we encoded as the slow payload. φ stands still between `pack` and the step, θ does not."""
        return (self._vectors.anchor if self._config.outer.slow_is_theta else self._vectors.phi)[span]

    def _keep_residual(self, piece: Piece) -> None:
        """e ← b·e + Δ − sent: what our own encoding lost, since somebody received the rest."""
        buffers, vectors = self._buffers_of(piece), self._vectors
        delta = torch.sub(vectors.anchor[piece.span], vectors.phi[piece.span], out=buffers.mean)
        self._payloads.read_delta(piece, buffers.scratch)
        vectors.residual[piece.span].mul_(self._config.error_decay).add_(delta).sub_(buffers.scratch)

    def _gather(self, piece: Piece, accepted: Sequence[Partner], *, learns: bool) -> tuple[Buffers, Tensor | None]:
        """The group's mean Δ in `buffers.mean`, and the pull if there is one. Alone, the mean is our exact Δ."""
        buffers, payloads, vectors = self._buffers_of(piece), self._payloads, self._vectors
        if payloads.group_mean is not None:
            payloads.read_group_mean(piece, buffers.mean)
        elif accepted and payloads.delta.numel():
            payloads.mix_deltas(piece, buffers.mean, buffers.scratch, accepted)
        elif self._config.outer.keeps_slow:
            torch.sub(vectors.anchor[piece.span], vectors.phi[piece.span], out=buffers.mean)
        if not accepted or not payloads.slow.numel():
            return buffers, None
        payloads.sum_pulls(piece, self._near(piece.span), buffers, accepted, learns=learns)
        return buffers, buffers.pull

    def _step(self, piece: Piece, accepted: Sequence[Partner], *, scale: float, clip: float) -> None:
        """Update φ and δ of one piece: φ moves by `scale` times the step, and δ shrinks by `clip`."""
        outer, vectors = self._config.outer, self._vectors
        phi = vectors.phi[piece.span]
        momentum = vectors.momentum[piece.span] if outer.has_momentum else vectors.momentum
        buffers, pull = self._gather(piece, accepted, learns=True)
        if not outer.keeps_slow:
            phi.copy_(vectors.anchor[piece.span])
        if scale == 1.0:
            outer_step(phi, momentum, buffers.mean, pull, outer)
            return
        outer_step(buffers.step.zero_(), momentum, buffers.mean, pull, outer)
        phi.add_(buffers.step, alpha=scale)
        momentum.mul_(clip)

    def _correct(self, piece: Piece, *, moves: bool) -> Tensor:
        """Move θ by the share 1 − a of φ − anchor, which is returned. Where φ is the anchor, θ must not even be rounded."""
        vectors, blend = self._vectors, self._config.blend
        theta, anchor, phi = vectors.theta[piece.span], vectors.anchor[piece.span], vectors.phi[piece.span]
        shift = torch.sub(phi, anchor, out=self._buffers_of(piece).scratch)
        if moves and blend == 0.0:
            theta.sub_(anchor).add_(phi)  # exactly φ when no step was taken meanwhile
        elif moves:
            theta.add_(shift, alpha=1.0 - blend)
        return shift

    def _buffers_of(self, piece: Piece) -> Buffers:
        return Buffers(*(buffer[: piece.span.stop - piece.span.start] for buffer in self._buffers))

    def _pieces(self, round: int) -> Iterator[Piece]:
        return self._fragments.pieces(self._fragments.index(round), max_numel=self._tile)
