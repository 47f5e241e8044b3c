"""The passes of pair averaging as compiled loops: what averaging/passes.py does with a dozen operations per tile, in one.

    pack      Δ = θ − φ;  φ ← θ;  bytes ← encode(θ);  Σ Δ²
    measure   Σ (theirs − ours)², and which blocks could be read; nothing is written
    step      φ' = φ + Σ factor·(theirs − ours);  θ ← (θ − φ) + φ';  φ ← φ'

An exchange of a large model is bound by memory, and eager torch moves every vector through a dozen buffers: it takes two to five
times the processor time (docs/LOG.md). The price is some ten seconds of compiling at the first use on a machine, so this
route is for large models. Since what is averaged is θ itself, φ's place keeps θ as it was packed, and there is no anchor.

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

from averaging.codec import CAST_TYPES
from averaging.fragments import Fragments, Piece
from averaging.partners import Measurement, Partner, TileNorm
from averaging.payloads import Payloads
from averaging.replica_config import ReplicaConfig
from averaging.vectors import Passes, Vectors
from averaging.window import LatticeWindow
from kernels.dispatch import compiled_version
from kernels.formats import LATTICE, Q4, Q8
from kernels.lattice import WINDOW, checksum_weights, lattice_fields, read_blocks, write_blocks
from kernels.quantize import block_kernels, quantized_fields
from protocol.ids import PeerId

__all__ = ["FusedPasses", "is_fusible"]

Fields = tuple[Tensor, ...]

_BLOCK = 256
"""Elements per block where the codec has none of its own."""
_PIECE_NUMEL = 1 << 20
"""Elements per call: what is summed in fp32 is one block, and a call costs nothing beside it."""
_QUANTIZED = {"q8": Q8, "q4": Q4}


def is_fusible(config: ReplicaConfig) -> bool:
    """Whether this route knows the run's way of averaging."""
    return config.outer.algorithm == "pair-average" and config.outer.momentum_clip == 0.0


@dataclass(slots=True)
class _Seen:
    """What `measure` found in one partner's payload, per block and piece, for the lattice's window: fp32 and bool [B]."""

    squares: list[Tensor] = field(default_factory=list)
    readable: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Part:
    """Whole blocks of one piece.

    Args:
        theta, phi: fp32 [N].
        fields: of our payload and of the partners', one after the other.
        distance: of the lattice's window, fp32 [B, 1]; empty for other codecs.
        numel: elements of a block that count: those of the padding do not.
        is_padded: whether all this are copies, too short to compile for.
    """

    theta: Tensor
    phi: Tensor
    fields: tuple[Fields, ...]
    distance: Tensor
    numel: int
    is_padded: bool


class FusedPasses(Passes):
    """See the module; arguments as for `averaging.passes.TiledPasses`. The anchor is φ itself."""

    def __init__(self, vectors: Vectors, payloads: Payloads, fragments: Fragments, config: ReplicaConfig) -> None:
        assert is_fusible(config)
        assert vectors.anchor is vectors.phi
        self._theta, self._phi = vectors.theta, vectors.phi
        self._payloads, self._fragments = payloads, fragments
        self._codec, self._keep = config.slow_codec, 1.0 - config.blend
        self._block = max(payloads.slow_codec.block, 64) if config.slow_codec in _QUANTIZED else _BLOCK
        self._weights = checksum_weights(vectors.theta.device)
        self._seen: dict[PeerId, _Seen] = {}

    def pack(self, round: int) -> float:
        size, norm = TileNorm(), TileNorm()
        for piece in self._pieces(round):
            size.add(self._theta[piece.span])
        if not math.isfinite(size.total()):
            return math.nan  # φ must stay as it was
        for piece in self._pieces(round):
            for part in self._parts(piece, [self._payloads.slow]):
                pack = _pack if part.is_padded else compiled_version(_pack)
                squares = pack(
                    self._codec, part.theta, part.phi, part.fields[0], part.distance, part.numel, self._weights
                )
                norm.add_squares(squares)
        return norm.total()

    def measure(self, round: int, partners: Sequence[Partner]) -> list[Measurement]:
        self._seen = {partner.peer: _Seen() for partner in partners}
        return [self._measure(round, partner) for partner in partners]

    def step(
        self, round: int, accepted: Sequence[Partner], *, scale: float, clip: float, keeps_residual: bool
    ) -> float:
        if not accepted:  # φ holds θ as it was packed, which is the solo step
            return 0.0
        shift = TileNorm()
        factors = tuple(torch.tensor(scale * p.slow_factor, device=self._theta.device) for p in accepted)
        for piece in self._pieces(round):
            for part in self._parts(piece, [self._payloads.slow, *(partner.slow for partner in accepted)]):
                step = _step if part.is_padded else compiled_version(_step)
                squares = step(self._codec, part.theta, part.phi, part.fields, factors, self._keep, self._weights)
                shift.add_squares(squares)
        self._learn(round, accepted)
        return shift.total()

    def step_norm(self, round: int, accepted: Sequence[Partner]) -> float:
        raise AssertionError("pair averaging has no momentum to clip")

    def _measure(self, round: int, partner: Partner) -> Measurement:
        found, seen = Measurement(), self._seen[partner.peer]
        for piece in self._pieces(round):
            for part in self._parts(piece, [self._payloads.slow, partner.slow]):
                measure = _measure if part.is_padded else compiled_version(_measure)
                ours, theirs = part.fields
                squares, readable = measure(self._codec, part.phi, ours, theirs, self._weights)
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
            theta, phi = self._theta[piece.span][begin:][:count], self._phi[piece.span][begin:][:count]
            fields = tuple(self._fields(payload, piece.start + begin, count) for payload in payloads)
            distance = self._distance(piece.span.start + begin, count)
            if count == tail:
                yield from self._padded_part(theta, phi, fields, distance)
            else:
                yield _Part(theta, phi, fields, distance, numel=self._block, is_padded=False)

    def _padded_part(self, theta: Tensor, phi: Tensor, fields: tuple[Fields, ...], distance: Tensor) -> Iterator[_Part]:
        """Copies of a short block, which are copied back afterwards; fields of plain values are as short as θ, others are not."""
        is_plain = self._codec in CAST_TYPES
        copies = [_padded(view, self._block) for view in (theta, phi)]
        padded = tuple((_padded(group[0], self._block),) for group in fields) if is_plain else fields
        yield _Part(copies[0], copies[1], padded, distance, numel=theta.numel(), is_padded=True)
        theta.copy_(copies[0][: theta.numel()])
        phi.copy_(copies[1][: theta.numel()])
        if is_plain:
            fields[0][0].copy_(padded[0][0][: theta.numel()])

    def _fields(self, payload: Tensor, start: int, count: int) -> Fields:
        """The part of a payload that holds `count` values from `start` on: [B, …] each, or [N] where values are plain."""
        if self._codec in CAST_TYPES:
            return (payload.view(CAST_TYPES[self._codec])[start : start + count],)
        fields = (
            lattice_fields(payload) if self._codec == "lattice" else quantized_fields(payload, _QUANTIZED[self._codec])
        )
        return tuple(each[start // self._block : -(-(start + count) // self._block)] for each in fields)

    def _distance(self, start: int, count: int) -> Tensor:
        if self._payloads.window is None:
            return self._theta.new_empty(0)
        return self._payloads.window.distance[
            start // LATTICE.block_size : -(-(start + count) // LATTICE.block_size), None
        ]


# ---- what is compiled ----


def _pack(
    codec: str, theta: Tensor, phi: Tensor, fields: Fields, distance: Tensor, numel: int, weights: Tensor
) -> Tensor:
    """θ, φ fp32 [N] → fields; φ ← θ; distance rises to what the block moved. Returns Σ Δ², [B]."""
    blocks = _blocks(theta, codec)
    delta = blocks - _blocks(phi, codec)
    squares = torch.sum(delta * delta, dim=1)
    if codec == "lattice":
        moved = torch.sqrt(squares / numel)[:, None]
        size = torch.sqrt(torch.sum(blocks * blocks, dim=1) / numel)[:, None]
        # fmax: a diverged round must leave no NaN behind.
        wanted = LatticeWindow.bounded(torch.fmax(distance, moved), torch.nan_to_num(size))
        distance.copy_(wanted)
        largest = torch.amax(torch.abs(blocks), dim=1, keepdim=True)
        steps, checksums, codes = fields
        write_blocks(blocks, largest, wanted * (WINDOW / 8), steps, checksums, codes, weights)
    elif codec in _QUANTIZED:
        encode, _ = block_kernels(_QUANTIZED[codec])
        scales, codes = fields
        encode(theta, scales, codes, None, None)
    else:
        fields[0].copy_(theta)
    phi.copy_(theta)
    return squares


def _measure(codec: str, near: Tensor, ours: Fields, theirs: Fields, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (theirs − ours)² and which blocks are readable, [B] each."""
    values, readable = _read(codec, theirs, near, weights)
    difference = values - _own(codec, ours, near, weights)
    squares = torch.sum(difference * difference, dim=1)
    return torch.where(readable, squares, torch.zeros_like(squares)), readable


def _step(
    codec: str,
    theta: Tensor,
    phi: Tensor,
    fields: tuple[Fields, ...],
    factors: tuple[Tensor, ...],
    keep: float,
    weights: Tensor,
) -> Tensor:
    """φ and θ take the step; returns Σ (φ' − φ)², [B]."""
    packed, ours = _blocks(phi, codec), _own(codec, fields[0], phi, weights)
    pull = torch.zeros_like(packed)
    for theirs, factor in zip(fields[1:], factors, strict=True):
        values, readable = _read(codec, theirs, phi, weights)
        pull = pull + torch.where(readable[:, None], values - ours, torch.zeros_like(ours)) * factor
    moved = packed + pull
    shift = moved - packed
    weights_now = _blocks(theta, codec)
    theta.copy_(((weights_now - packed) + moved if keep == 1.0 else weights_now + shift * keep).view(-1))
    phi.copy_(moved.view(-1))
    return torch.sum(shift * shift, dim=1)


def _blocks(x: Tensor, codec: str) -> Tensor:
    return x.view(-1, Q4.block_size if codec == "q4" else _BLOCK)


def _read(codec: str, fields: Fields, near: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Decoded values [B, n], and which blocks are readable, [B]."""
    if codec in CAST_TYPES:
        values = _blocks(fields[0].float(), codec)
    else:
        out = torch.empty_like(near)
        if codec == "lattice":
            steps, checksums, codes = fields
            readable = read_blocks(near, steps, checksums, codes, weights, out)
            return _blocks(out, codec), readable
        _, decode = block_kernels(_QUANTIZED[codec])
        scales, codes = fields
        decode(scales, codes, out)
        values = _blocks(out, codec)
    return values, torch.ones_like(values[:, 0], dtype=torch.bool)


def _own(codec: str, fields: Fields, near: Tensor, weights: Tensor) -> Tensor:
    """Our own values as they travelled, [B, n]. Those of the lattice need no codes: `near` is what was encoded."""
    if codec != "lattice":
        return _read(codec, fields, near, weights)[0]
    step = fields[0].float()
    return torch.round(_blocks(near, codec) * (1 / step)) * step


def _padded(tail: Tensor, numel: int) -> Tensor:
    padded = tail.new_zeros(numel)
    padded[: tail.numel()] = tail
    return padded
