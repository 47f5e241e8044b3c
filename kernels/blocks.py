"""Block formats in memory: a payload's fields, the tiles that kernels work on, and codes of four bits.

A payload holds one field after the other, each with the same number of bytes for every block, so that all offsets follow from
the number of blocks. A kernel is one plain function over whole blocks. It is used twice: eagerly, tile by tile with a scratch
tile that stays in cache (whole-tensor temporaries would cost three times the time), and through torch.compile over the
whole slice, since compiled code keeps intermediate values in registers.

Shape legend: N elements, B blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import tile_numel
from kernels.formats import BlockFormat

__all__ = [
    "SMALLEST_NORMAL",
    "Tile",
    "converted",
    "nibbles",
    "pack_nibbles",
    "rounded_to_bfloat16",
    "split_fields",
    "tiles",
]

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
"""A smaller step has lost precision, and its inverse overflows."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Whole blocks of one slice.

    Args:
        vectors: fp32 [N] each, N a multiple of the block size.
        fields: [B, …] each.
        first: position of the first element in the whole tensor.
        padded: whether this is the short last block; its vectors are copies, padded with zeros.
        scratch: fp32 [N] working memory, or None where the kernel shall allocate (compiled code needs none).
    """

    vectors: tuple[Tensor, ...]
    fields: tuple[Tensor, ...]
    first: int
    padded: bool
    scratch: Tensor | None


def split_fields(payload: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Cut a payload (uint8 [B × sum of widths]) into views [B, width], one per field."""
    assert payload.dtype == torch.uint8, "a payload is uint8"
    num_blocks, rest = divmod(payload.numel(), sum(widths))
    assert rest == 0, "a payload holds whole blocks"
    ends = [num_blocks * end for end in itertools.accumulate(widths)]
    return tuple(
        payload[end - num_blocks * width : end].view(num_blocks, width) for end, width in zip(ends, widths, strict=True)
    )


def tiles(
    vectors: tuple[Tensor, ...],
    fields: tuple[Tensor, ...],
    block_format: BlockFormat,
    *,
    start: int,
    compiled: bool,
    scratch: Tensor | None = None,
    writes: bool = False,
) -> Iterator[Tile]:
    """The blocks of one slice, tile by tile.

    Args:
        vectors: fp32 [N] each: the slice, and what goes with it.
        fields: the fields of the payload of the WHOLE tensor, [B, …] each.
        block_format: gives the block size.
        start: position of the slice in the whole tensor, a multiple of the block size; the slice must end at such a multiple
            or at the end.
        compiled: one tile for all whole blocks, without scratch.
        scratch: fp32 working memory of at least a tile or N; allocated when absent.
        writes: whether the last vector is the result, so that a padded copy has to be copied back.

    Yields:
        The tiles in order; the next one only after the work on the one before is done.
    """
    block, numel = block_format.block_size, vectors[0].numel()
    assert start % block == 0, f"a slice must start at a multiple of {block}, not at {start}"
    end = start // block + block_format.num_blocks(numel)
    assert end <= len(fields[0]), "slice lies beyond the payload"
    assert numel % block == 0 or end == len(fields[0]), "only the last block may be short"
    tail = numel % block
    whole = numel - tail
    step = max(whole, 1) if compiled else tile_numel(vectors[0].device)
    if scratch is None and not compiled:
        scratch = torch.empty(min(whole, step), device=vectors[0].device)
    for begin in range(0, whole, step):
        stop = min(begin + step, whole)
        first = start + begin
        yield Tile(
            vectors=tuple(vector[begin:stop] for vector in vectors),
            fields=tuple(field[first // block : (start + stop) // block] for field in fields),
            first=first,
            padded=False,
            scratch=None if scratch is None or compiled else scratch[: stop - begin],
        )
    if tail:
        copies = tuple(_padded(vector[-tail:], block) for vector in vectors)
        last = tuple(field[-1:] for field in fields)
        yield Tile(vectors=copies, fields=last, first=start + whole, padded=True, scratch=None)
        if writes:
            vectors[-1][-tail:] = copies[-1][:tail]


def pack_nibbles(codes: Tensor, out: Tensor) -> None:
    """Two codes per byte: uint8 [B, n] with values in 0 … 15 → out uint8 [B, n/2], byte i = code i | code (i + n/2) << 4.

    Halves of a block, not neighbours: both are then contiguous reads.
    """
    low, high = codes.chunk(2, dim=1)
    torch.bitwise_or(low, high << 4, out=out)


def nibbles(packed: Tensor, dtype: torch.dtype, *, out: Tensor | None) -> Tensor:
    """The codes that `pack_nibbles` packed: uint8 [B, n/2] → dtype [B, n], in `out` if it is given.

    Eager torch is three times slower where an operation mixes types, so the codes are converted once, in both halves of out.
    """
    if out is None:
        return torch.cat((packed & 15, packed >> 4), dim=1).to(dtype)
    low, high = out.chunk(2, dim=1)
    low.copy_(packed & 15)
    high.copy_(packed >> 4)
    return out


def converted(x: Tensor, dtype: torch.dtype, *, out: Tensor | None) -> Tensor:
    """x as another type, in `out` if it is given; out may be x's own memory."""
    return x.to(dtype) if out is None else out.copy_(x)


def rounded_to_bfloat16(x: Tensor) -> Tensor:
    """Non-negative fp32 values rounded half-even to bfloat16's precision, in fp32.

    By integer arithmetic, since torch.compile drops a cast to bfloat16 and back, and would take the unrounded value.
    """
    bits = x.view(torch.int32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    return torch.where(x < torch.inf, rounded, x)  # the carry would turn some NaN into zero


def _padded(tail: Tensor, block: int) -> Tensor:
    """A whole block that begins with `tail`."""
    padded = tail.new_zeros(block)
    padded[: tail.numel()] = tail
    return padded
