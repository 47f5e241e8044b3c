"""Numeric formats: how many bytes a tensor takes, and how far a decoded value may lie from the original.

A block format cuts a flat tensor into blocks of equal length, stores one scale per block and a small integer code per
value. All byte counts follow from the number of elements alone, so a receiver knows the length before the first byte
arrives. The error bound lives here, beside the format, and not in the tests that use it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Q8", "BlockFormat"]


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """One block format.

    Args:
        name: how configuration names it.
        block_size: elements that share one scale.
        scale_bytes: bytes of one scale.
        code_bits: bits of one code.
        max_code: codes lie in [−max_code, max_code].
        tolerance: largest |x − decode(encode(x))| of a finite block, in units of the block's max|x|.
    """

    name: str
    block_size: int
    scale_bytes: int
    code_bits: int
    max_code: int
    tolerance: float

    def num_blocks(self, numel: int) -> int:
        """Blocks needed for `numel` elements; the last one may be padded with zeros."""
        return -(-numel // self.block_size)

    def num_bytes(self, numel: int) -> int:
        """Exact bytes of an encoded tensor of `numel` elements: all scales, then all codes."""
        return self.num_blocks(numel) * (self.scale_bytes + self.block_size * self.code_bits // 8)


Q8 = BlockFormat(
    name="q8",
    block_size=256,
    scale_bytes=2,
    code_bits=8,
    max_code=127,
    # Half a code step; the step is max|x|/127 rounded to bfloat16's 8 significant bits, hence up to 2⁻⁸ larger.
    tolerance=0.5 / 127 * (1 + 2**-8),
)
"""Signed 8-bit codes, bfloat16 scale per 256 values: 1.008 bytes per value. fp16 scales would go subnormal at the
magnitudes that Δ has."""
