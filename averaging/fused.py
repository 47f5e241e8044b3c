"""The passes of the rules that send θ alone, as compiled loops: what averaging/passes.py does with a dozen operations, in one.

    pack      Δ = θ − φ;  anchor ← θ;  bytes ← encode(θ);  Σ Δ²
    measure   Σ (theirs − ours)², and which blocks could be read; nothing is written
    step      pull = Σ factor·(theirs − ours);  θ ← (θ − anchor) + φ';  φ ← φ', where
              pair-average      φ' = anchor + pull
              noloco, θ alone   δ ← α·δ + β·(anchor − φ) + γ·pull;  φ' = φ + δ

An exchange of a large model is bound by memory, and eager torch moves every vector through a dozen buffers: it takes two to five
times the processor time (docs/LOG.md). The price is some ten seconds of compiling at the first use on a machine, so this
route is for large models, where averaging/native_passes.py does not go: on other devices than a CPU. Pair averaging needs no vector
of its own for the anchor: φ's place keeps it.

The rules are those of passes.py; sums are rounded differently, and so may be the last bit of a lattice step.

Shape legend: N elements of a piece, B blocks of 256 (q4: 64). The last block of the model, where it is not full, is worked on in
padded copies and not compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from averaging import fused_loops as loops
from averaging.codec import CAST_TYPES
from averaging.fragments import Fragments, Piece
from averaging.fused_loops import BLOCK, QUANTIZED, Fields, Four
from averaging.partners import Measurement, Partner, TileNorm
from averaging.payloads import Payloads
from averaging.replica_config import ReplicaConfig
from averaging.vectors import Passes, Vectors
from kernels.dispatch import compiled_version
from kernels.formats import LATTICE
from kernels.lattice import checksum_weights, lattice_fields
from kernels.quantize import quantized_fields
from protocol.ids import PeerId

__all__ = ["FusedPasses", "is_fusible"]

_PIECE_NUMEL = 1 << 20
"""Elements per call: what is summed in fp32 is one block, and a call costs nothing beside it."""


def is_fusible(config: ReplicaConfig) -> bool:
    """Whether this route knows the run's way of averaging."""
    outer = config.outer
    sends_theta_alone = outer.algorithm == "pair-average" or (outer.algorithm == "noloco" and outer.theta_only)
    return sends_theta_alone and outer.momentum_clip == 0.0


@dataclass(slots=True)
class _Seen:
    """What `measure` found in one partner's payload, per block and piece, for the lattice's window: fp32 and bool [B]."""

    squares: list[Tensor] = field(default_factory=list)
    readable: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Part:
    """Whole blocks of one piece.

    Args:
        vectors: θ, φ, δ and anchor, fp32 [N]; the last two are empty with pair averaging.
        fields: of our payload and of the partners', one after the other.
        distance: of the lattice's window, fp32 [B, 1]; empty for other codecs.
        numel: elements of a block that count: those of the padding do not.
        is_padded: whether all this are copies, too short to compile for.
    """

    vectors: Four
    fields: tuple[Fields, ...]
    distance: Tensor
    numel: int
    is_padded: bool


class FusedPasses(Passes):
    """See the module; arguments as for `averaging.passes.TiledPasses`. With pair averaging the anchor is φ itself."""

    def __init__(self, vectors: Vectors, payloads: Payloads, fragments: Fragments, config: ReplicaConfig) -> None:
        assert is_fusible(config)
        self._is_pair_average = config.outer.algorithm == "pair-average"
        assert (vectors.anchor is vectors.phi) == self._is_pair_average
        self._theta, self._phi, self._momentum = vectors.theta, vectors.phi, vectors.momentum
        self._anchor = vectors.theta.new_empty(0) if self._is_pair_average else vectors.anchor
        self._outer = config.outer
        self._payloads, self._fragments = payloads, fragments
        self._codec, self._keep = config.slow_codec, 1.0 - config.blend
        self._block = max(payloads.slow_codec.block, 64) if config.slow_codec in QUANTIZED else BLOCK
        self._weights = checksum_weights(vectors.theta.device)
        self._seen: dict[PeerId, _Seen] = {}

    def pack(self, round: int) -> float:
        if self._is_pair_average and not self._is_finite(round):
            return math.nan  # φ must stay as it was
        norm, window = TileNorm(), self._payloads.window
        drift = torch.zeros((), device=self._theta.device) if window is None else window.drift_of(round)
        for piece in self._pieces(round):
            for part in self._parts(piece, [self._payloads.slow]):
                pack = loops.pack if part.is_padded else compiled_version(loops.pack)
                squares = pack(
                    self._codec, part.vectors, part.fields[0], part.distance, drift, part.numel, self._weights
                )
                norm.add_squares(squares)
        return norm.total()

    def measure(self, round: int, partners: Sequence[Partner]) -> list[Measurement]:
        self._seen = {partner.peer: _Seen() for partner in partners}
        return [self._measure(round, partner) for partner in partners]

    def step(
        self, round: int, accepted: Sequence[Partner], *, scale: float, clip: float, keeps_residual: bool
    ) -> float:
        if self._is_pair_average and not accepted:  # φ holds θ as it was packed, which is the solo step
            return 0.0
        shift, outer = TileNorm(), self._outer
        pull_scale = scale if self._is_pair_average else 1.0
        factors = tuple(torch.tensor(pull_scale * p.slow_factor, device=self._theta.device) for p in accepted)
        scales = torch.tensor([scale, clip], device=self._theta.device)
        for piece in self._pieces(round):
            for part in self._parts(piece, [self._payloads.slow, *(partner.slow for partner in accepted)]):
                # A group of any size would be compiled for anew.
                step = loops.step if part.is_padded or len(accepted) > 1 else compiled_version(loops.step)
                squares = step(
                    self._codec, part.vectors, part.fields, factors, scales, outer, self._keep, self._weights
                )
                shift.add_squares(squares)
        self._learn(round, accepted)
        return shift.total()

    def step_norm(self, round: int, accepted: Sequence[Partner]) -> float:
        raise AssertionError("runs with a momentum clip take the other route")

    def _is_finite(self, round: int) -> bool:
        size = TileNorm()
        for piece in self._pieces(round):
            size.add(self._theta[piece.span])
        return math.isfinite(size.total())

    def _measure(self, round: int, partner: Partner) -> Measurement:
        found, seen = Measurement(), self._seen[partner.peer]
        for piece in self._pieces(round):
            for part in self._parts(piece, [self._payloads.slow, partner.slow]):
                measure = loops.measure if part.is_padded else compiled_version(loops.measure)
                ours, theirs = part.fields
                squares, readable = measure(self._codec, loops.packed_theta(part.vectors), ours, theirs, self._weights)
                found.slow.add_squares(squares)
                seen.squares.append(squares / part.numel)
                seen.readable.append(readable)
        readable = torch.cat(seen.readable)
        found.num_blocks, found.num_unreadable = len(readable), int((~readable).sum())
        return found

    def _learn(self, round: int, accepted: Sequence[Partner]) -> None:
        """Let the lattice's window follow what was found."""
        window = self._payloads.window
        if window is None:
            return
        for partner in accepted:
            seen, first = self._seen[partner.peer], 0
            squares, readable = torch.cat(seen.squares), torch.cat(seen.readable)
            for piece in self._pieces(round):
                last = first - (piece.span.start - piece.span.stop) // self._block
                window.follow(piece, partner.slow, rms=squares[first:last].sqrt(), unreadable=~readable[first:last])
                first = last

    def _pieces(self, round: int) -> Iterator[Piece]:
        return self._fragments.pieces(self._fragments.index(round), max_numel=_PIECE_NUMEL)

    def _parts(self, piece: Piece, payloads: Sequence[Tensor]) -> Iterator[_Part]:
        """The whole blocks of a piece, and then the last one of the model, if it is short, as padded copies."""
        numel = piece.span.stop - piece.span.start
        tail = numel % self._block
        for begin, count in ((0, numel - tail), (numel - tail, tail)):
            if count == 0:
                continue
            span = slice(piece.span.start + begin, piece.span.start + begin + count)
            vectors = self._theta[span], self._phi[span], self._momentum[span], self._anchor[span]
            fields = tuple(self._fields(payload, piece.start + begin, count) for payload in payloads)
            distance = self._distance(piece.span.start + begin, count)
            if count == tail:
                yield from self._padded_part(vectors, fields, distance)
            else:
                yield _Part(vectors, fields, distance, numel=self._block, is_padded=False)

    def _padded_part(self, vectors: Four, fields: tuple[Fields, ...], distance: Tensor) -> Iterator[_Part]:
        """Copies of a short block, which are copied back afterwards; fields of plain values are as short as θ, others are not."""
        tail, is_plain = vectors[0].numel(), self._codec in CAST_TYPES
        theta, phi, momentum, anchor = (
            _padded(vector, self._block) if vector.numel() else vector for vector in vectors
        )
        copies = theta, phi, momentum, anchor
        padded = tuple((_padded(group[0], self._block),) for group in fields) if is_plain else fields
        yield _Part(copies, padded, distance, numel=tail, is_padded=True)
        for vector, copy in zip(vectors, copies, strict=True):
            vector.copy_(copy[: vector.numel()])
        if is_plain:
            fields[0][0].copy_(padded[0][0][:tail])

    def _fields(self, payload: Tensor, start: int, count: int) -> Fields:
        """The part of a payload that holds `count` values from `start` on: [B, …] each, or [N] where values are plain."""
        if self._codec in CAST_TYPES:
            return (payload.view(CAST_TYPES[self._codec])[start : start + count],)
        fields = (
            lattice_fields(payload) if self._codec == "lattice" else quantized_fields(payload, QUANTIZED[self._codec])
        )
        return tuple(each[start // self._block : -(-(start + count) // self._block)] for each in fields)

    def _distance(self, start: int, count: int) -> Tensor:
        if self._payloads.window is None:
            return self._theta.new_empty(0)
        return self._payloads.window.distance[
            start // LATTICE.block_size : -(-(start + count) // LATTICE.block_size), None
        ]


def _padded(tail: Tensor, numel: int) -> Tensor:
    padded = tail.new_zeros(numel)
    padded[: tail.numel()] = tail
    return padded
