"""Numeric formats: how many bytes a tensor takes, and how far a decoded value may lie from the original.

A block format cuts a flat tensor into blocks of equal length and stores each in the same number of bytes: a scale, a small
code per value, and whatever else the format needs. All byte counts follow from the number of elements alone, so a receiver
knows the length before the first byte arrives. The error bound lives here, beside the format, and not in the tests that
use it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["E3M0", "LATTICE", "Q4", "Q8", "TOPK", "BlockFormat"]


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """One block format.

    Args:
        name: how configuration names it.
        block_size: elements in a block.
        block_bytes: bytes of an encoded block.
        tolerance: largest |x − decode(encode(x))| of a finite block, in units of the block's max|x|; of its step for LATTICE.
    """

    name: str
    block_size: int
    block_bytes: int
    tolerance: float

    def num_blocks(self, numel: int) -> int:
        """Blocks needed for `numel` elements; the last one may be padded with zeros."""
        return -(-numel // self.block_size)

    def num_bytes(self, numel: int) -> int:
        """Exact bytes of an encoded tensor of `numel` elements."""
        return self.num_blocks(numel) * self.block_bytes


Q8 = BlockFormat(
    name="q8",
    block_size=256,
    block_bytes=2 + 256,
    # Half a code step; the step is max|x|/127 rounded to bfloat16's 8 significant bits, hence up to 2⁻⁸ larger.
    tolerance=0.5 / 127 * (1 + 2**-8),
)
"""Signed 8-bit codes, bfloat16 scale per 256 values: 1.008 bytes per value. fp16 scales would go subnormal at the
magnitudes that Δ has."""

Q4 = BlockFormat(name="q4", block_size=64, block_bytes=2 + 32, tolerance=0.5 / 7 * (1 + 2**-8))
"""Codes −7 … 7, bfloat16 scale per 64 values: 0.531 bytes per value."""

E3M0 = BlockFormat(
    name="e3m0",
    block_size=64,
    block_bytes=2 + 32,
    # A value in the middle between the two largest levels, 0.9·max|x| (rounded to bfloat16) and half of it.
    tolerance=0.9 / 4 * (1 + 2**-8),
)
"""Sign and a power of two, bfloat16 scale per 64 values: 0.531 bytes per value; finer than q4 near zero, coarser above."""

TOPK = BlockFormat(name="topk", block_size=4096, block_bytes=4 + 16 + 96, tolerance=1.0)
"""The 64 largest of 4096 values: two bfloat16 levels, a 2-bit code and a 12-bit index each: 0.028 bytes per value."""

LATTICE = BlockFormat(
    name="lattice",
    block_size=256,
    block_bytes=2 + 2 + 128,
    # Half a step, and fp32's own rounding, which reaches a quarter of a step when the value is 2²⁰ steps large.
    tolerance=0.75,
)
"""Four bits that say where in a window a value lies, bfloat16 step and 16-bit checksum per 256 values: 0.516 bytes per value."""
