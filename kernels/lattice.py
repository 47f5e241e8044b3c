"""Modular quantisation: four bits per weight for a receiver whose own weights are near (format LATTICE).

Replicas of one model differ by far less than their weights are large. So a code only says where in a window a value lies, and
the receiver resolves the rest with its own value:

    step = 2·WINDOW·rms(motion of the block) / 16          k = round(x / step)          code = k mod 16
    receiver with y near x:  m = round(y / step);  k' = m + ((code − m + 8) mod 16) − 8;  value = k' · step

k' = k whenever x and y differ by less than 7.5 steps. Motion, how far x moved since it was last exchanged, is a guess at
that distance. Where the guess was too small, k' is off by a multiple of 16: a checksum over ⌊k / 16⌋, the part that does
not travel, tells, and the receiver keeps its own values for that block and counts it.

    payload = steps (bfloat16 [B]) | checksums (16 bits [B]) | codes (128 bytes per block, see blocks.pack_nibbles)

Source of the idea: Moniqua (arXiv 2002.11787) and Davies et al. (arXiv 2002.09268); the checksum is ours. Its weights are odd and
irregular: in a plain sum, two values that wrapped in opposite directions would cancel.

Shape legend: N elements, B blocks of 256.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.blocks import SMALLEST_NORMAL, converted, nibbles, pack_nibbles, rounded_to_bfloat16, split_fields, tiles
from kernels.dispatch import compiled_version
from kernels.formats import LATTICE

__all__ = [
    "WINDOW",
    "checksum_weights",
    "lattice_decode",
    "lattice_encode",
    "lattice_fields",
    "read_blocks",
    "write_blocks",
]

WINDOW = 5.0
"""Half-width of the window, in units of the motion's rms."""

_BLOCK = LATTICE.block_size
_FIELDS = 2, 2, 128
_SMALLEST_STEP = 2.0**-20
"""Smallest step in units of max|x|: keeps |k| within 2²¹, where fp32 still tells two lattice points apart."""
_FARTHEST = 2.0**22
"""A receiver's coordinate beyond this can not be near any honest one, and might overflow."""
_NO_MOTION = 1e-30
"""Motion below this counts as none: its inverse might overflow."""


def lattice_encode(
    x: Tensor,
    *,
    out: Tensor,
    motion: Tensor | None = None,
    window: float = WINDOW,
    start: int = 0,
    scratch: Tensor | None = None,
    compiled: bool = False,
) -> None:
    """Encode a tensor, or one slice of it, into a payload.

    Args:
        x: fp32 [N], contiguous. A block that is not finite, or whose motion is not, becomes unreadable.
        out: uint8 payload of the WHOLE tensor.
        motion: fp32 [N], how far x moved; None: from zero, so that a receiver without `near` can read it.
        window: half-width of the window in units of rms(motion).
        start: position of x[0] in the whole tensor, a multiple of 256; x must end at a multiple of 256 or at the end.
        scratch: fp32 working memory of at least one tile (`dispatch.tile_numel`) or N, apart from x and motion.
        compiled: take the compiled route (same bytes).
    """
    encode = compiled_version(_encode_blocks) if compiled else _encode_blocks
    weights, factor = checksum_weights(x.device), torch.tensor(window / 8, device=x.device)
    vectors = (x, x if motion is None else motion)
    for tile in tiles(vectors, lattice_fields(out), LATTICE, start=start, compiled=compiled, scratch=scratch):
        kernel = _encode_blocks if tile.padded else encode
        values, moved = tile.vectors
        steps, checksums, codes = tile.fields
        kernel(values, moved, steps, checksums, codes, factor, weights, tile.scratch)


def lattice_decode(
    payload: Tensor, out: Tensor, *, near: Tensor | None = None, start: int = 0, compiled: bool = False
) -> int:
    """Decode a payload, or one slice of it: out ← values.

    Args:
        payload: uint8 payload of the WHOLE tensor.
        out: fp32 [N], contiguous.
        near: fp32 [N], our own values, apart from out; they stand in for unreadable blocks. None: zeros.
        start: position of out[0] in the whole tensor, as in `lattice_encode`.
        compiled: take the compiled route (same values).

    Returns:
        How many blocks could not be read.
    """
    decode = compiled_version(read_blocks) if compiled else read_blocks
    weights = checksum_weights(out.device)
    near = torch.zeros_like(out) if near is None else near
    num_unreadable = 0
    for tile in tiles((near, out), lattice_fields(payload), LATTICE, start=start, compiled=compiled, writes=True):
        kernel = read_blocks if tile.padded else decode
        own, values = tile.vectors
        steps, checksums, codes = tile.fields
        readable = kernel(own, steps, checksums, codes, weights, values, tile.scratch)
        if not readable.all():  # rare; and a select by block is slow in eager torch
            bad = ~readable
            values.view(-1, _BLOCK)[bad] = own.view(-1, _BLOCK)[bad]
            num_unreadable += int(bad.sum())
    return num_unreadable


def _encode_blocks(
    x: Tensor,
    motion: Tensor,
    steps: Tensor,
    checksums: Tensor,
    codes: Tensor,
    factor: Tensor,
    weights: Tensor,
    scratch: Tensor | None,
) -> None:
    """x, motion fp32 [N] → steps bfloat16 [B, 1], checksums int16 [B, 1], codes uint8 [B, 128]."""
    shape = len(steps), _BLOCK
    scratch = None if scratch is None else scratch.view(shape)
    blocks = x.view(shape)
    largest = torch.amax(torch.abs(blocks, out=scratch), dim=1, keepdim=True)
    spread = _rms(motion.view(shape), scratch) * factor
    write_blocks(blocks, largest, spread, steps, checksums, codes, weights, scratch)


def write_blocks(
    blocks: Tensor,
    largest: Tensor,
    spread: Tensor,
    steps: Tensor,
    checksums: Tensor,
    codes: Tensor,
    weights: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """Encode whole blocks; for callers that fuse it with work of their own.

    Args:
        blocks: fp32 [B, 256].
        largest: max|x| of each, [B, 1].
        spread: wanted distance between lattice points, fp32 [B, 1].
        steps, checksums, codes: the three fields, written.
        weights: `checksum_weights`.
        scratch: fp32 [B, 256] for eager work, apart from blocks.
    """
    integers = None if scratch is None else scratch.view(torch.int32)
    floor = (largest * _SMALLEST_STEP).clamp(min=SMALLEST_NORMAL)
    step = rounded_to_bfloat16(torch.maximum(spread, floor))
    steps.copy_(step)
    # Not finite: the step says so, and the codes may be anything.
    inverse = torch.where(step < torch.inf, 1 / step, torch.zeros_like(step))
    scaled = torch.mul(blocks, inverse, out=scratch)
    k = converted(torch.round(scaled, out=scratch), torch.int32, out=integers)
    pack_nibbles(k.to(torch.uint8) & 15, codes)
    checksums.copy_(_checksum(torch.bitwise_right_shift(k, 4, out=integers), weights, integers))


def read_blocks(
    near: Tensor,
    steps: Tensor,
    checksums: Tensor,
    codes: Tensor,
    weights: Tensor,
    out: Tensor,
    scratch: Tensor | None = None,
) -> Tensor:
    """Decode whole blocks: near fp32 [N] and the three fields → out fp32 [N].

    With m, code and high = ⌊k' / 16⌋ there is no need for k' mod 16: high = ⌊(m + 7 − code) / 16⌋ and k' = 16·high + code. Eagerly,
    out and scratch take turns as buffers.

    Returns:
        Which blocks are readable, bool [B]; the others hold anything.
    """
    shape = len(steps), _BLOCK
    values, step = out.view(shape), steps.float()
    work = None if scratch is None else values
    work_int = None if scratch is None else values.view(torch.int32)
    scratch = None if scratch is None else scratch.view(shape)
    scratch_int = None if scratch is None else scratch.view(torch.int32)
    usable = (step >= SMALLEST_NORMAL) & (step < torch.inf)
    inverse = torch.where(usable, 1 / step, torch.zeros_like(step))
    m = torch.round(torch.mul(near.view(shape), inverse, out=work), out=work)
    usable &= torch.amax(torch.abs(m, out=scratch), dim=1, keepdim=True) <= _FARTHEST  # false for NaN
    position = converted(m, torch.int32, out=scratch_int)
    code = nibbles(codes, torch.int32, out=work_int)
    above = torch.add(torch.sub(position, code, out=scratch_int), 7, out=scratch_int)
    high = torch.bitwise_right_shift(above, 4, out=scratch_int)
    k = torch.add(code, high, alpha=16, out=work_int)
    usable &= _checksum(high, weights, scratch_int) == checksums
    torch.mul(converted(k, torch.float32, out=scratch), step, out=values)
    return usable.view(-1)


def _rms(x: Tensor, scratch: Tensor | None) -> Tensor:
    """Root mean square per row, [B, 1], to a few per mille.

    Values are rounded to 255ths of the largest first: their squares then add up to less than 2²⁴, exactly in any order, so that
    eager and compiled code agree to the bit.
    """
    size = torch.abs(x, out=scratch)
    largest = torch.amax(size, dim=1, keepdim=True)
    inverse = torch.where(largest >= _NO_MOTION, 255 / largest, torch.zeros_like(largest))
    units = torch.round(torch.mul(size, inverse, out=scratch), out=scratch)
    squares = torch.sum(torch.mul(units, units, out=scratch), dim=1, keepdim=True)
    return torch.sqrt(squares * (1 / _BLOCK)) * (largest * (1 / 255))


def _checksum(high: Tensor, weights: Tensor, scratch: Tensor | None) -> Tensor:
    """high = ⌊k / 16⌋, int32 [B, 256] → int16 [B, 1]: Σ weight · high modulo 2¹⁶."""
    products = torch.mul(high, weights, out=scratch).view(len(high), 4, _BLOCK // 4)
    # In two stages: compiled code is slow at adding up the lanes of one integer register, and this halves its time.
    lanes = torch.sum(products, dim=1, dtype=torch.int32)
    return torch.sum(lanes, dim=1, keepdim=True, dtype=torch.int32).to(torch.int16)


@functools.cache
def checksum_weights(device: torch.device) -> Tensor:
    """256 different odd numbers below 2¹⁵, int32 [256]: no two of them add up to 0 modulo 2¹⁶, whatever their signs."""
    order = [(pow(5, position, 1 << 16) & 0x7FFF) | 1 for position in range(_BLOCK)]
    assert len(set(order)) == _BLOCK, "weights must differ"
    return torch.tensor(order, dtype=torch.int32, device=device)


def lattice_fields(payload: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a payload: steps bfloat16 [B, 1], checksums int16 [B, 1], codes uint8 [B, 128]."""
    steps, checksums, codes = split_fields(payload, _FIELDS)
    return steps.view(torch.bfloat16), checksums.view(torch.int16), codes
