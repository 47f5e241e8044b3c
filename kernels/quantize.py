"""Blockwise quantisation to signed integers: eight bits (format Q8) and four (Q4); E3M0 has the same fields.

    payload = scales (bfloat16, one per block, little-endian) | codes; the last block is padded with 0
    scale   = bfloat16(max|x| / M), M = 127 or 7        code = round-half-even(x / scale)        value = code × scale
    Q8 code: int8, 256 per block    Q4 code: code + 7 in four bits, 64 per block    E3M0: see kernels/powers.py

Codes are computed from the rounded scale, so the scale's own rounding adds no error. Rounding is to nearest where what it loses
is carried over to the next round (error feedback: unbiased over time, less noise), and in all that runs send: for φ and θ it
brings replicas nearer, too (docs/LOG.md). On request it is stochastic, for values that nothing carries:
code = floor(x / scale + noise), unbiased in the value, with the scale rounded up so that no code needs clamping. A block that
holds NaN or Inf decodes to a block that holds NaN or Inf; receivers must check.

`encode_reference` and `decode_reference` say the same in the most obvious way, for the tests.

Shape legend: N elements, B blocks of n elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.blocks import SMALLEST_NORMAL, nibbles, pack_nibbles, rounded_to_bfloat16, split_fields, tiles
from kernels.dispatch import compiled_version
from kernels.formats import Q4, Q8, BlockFormat
from kernels.powers import e3m0_decode_add_blocks, e3m0_decode_blocks, e3m0_encode_blocks
from kernels.rounding import noise, noise_key

__all__ = [
    "block_kernels",
    "decode",
    "decode_add",
    "decode_reference",
    "encode",
    "encode_reference",
    "quantized_fields",
]

EncodeBlocks = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None]
DecodeBlocks = Callable[[Tensor, Tensor, Tensor], None]


def encode(
    x: Tensor,
    block_format: BlockFormat,
    *,
    out: Tensor,
    start: int = 0,
    scratch: Tensor | None = None,
    compiled: bool = False,
    seed: int | None = None,
) -> None:
    """Encode a tensor, or one slice of it, into a payload.

    Args:
        x: fp32 [N], contiguous.
        block_format: Q8, Q4 or E3M0.
        out: uint8 payload of the WHOLE tensor.
        start: position of x[0] in the whole tensor, a multiple of the block size; x must end at such a multiple or at the end.
        scratch: fp32 working memory of at least one tile (`dispatch.tile_numel`) or N, contiguous, apart from x; allocated
            when absent.
        compiled: take the compiled route (same bytes).
        seed: round stochastically with this seed (Q8 and Q4); None: to nearest.
    """
    eager = _ENCODE[block_format.name]
    encode_blocks = compiled_version(eager) if compiled else eager
    fields = quantized_fields(out, block_format)
    for tile in tiles((x,), fields, block_format, start=start, compiled=compiled, scratch=scratch):
        kernel = eager if tile.padded else encode_blocks
        key = None if seed is None else noise_key(seed, tile.first, x.device)
        scales, codes = tile.fields
        kernel(tile.vectors[0], scales, codes, key, tile.scratch)


def decode(payload: Tensor, out: Tensor, block_format: BlockFormat, *, start: int = 0, compiled: bool = False) -> None:
    """Decode a payload, or one slice of it: out ← values.

    Args:
        payload: uint8 payload of the WHOLE tensor.
        out: fp32 [N], contiguous.
        block_format: Q8, Q4 or E3M0.
        start: position of out[0] in the whole tensor, as in `encode`.
        compiled: take the compiled route (same values).
    """
    eager = _DECODE[block_format.name]
    decode_blocks = compiled_version(eager) if compiled else eager
    fields = quantized_fields(payload, block_format)
    for tile in tiles((out,), fields, block_format, start=start, compiled=compiled, writes=True):
        kernel = eager if tile.padded else decode_blocks
        scales, codes = tile.fields
        kernel(scales, codes, tile.vectors[0])


def decode_add(
    payload: Tensor,
    out: Tensor,
    block_format: BlockFormat,
    *,
    weight: float,
    start: int = 0,
    scratch: Tensor | None = None,
    compiled: bool = False,
) -> None:
    """Decode and accumulate: out ← out + code × (scale × weight).

    Args:
        payload, out, block_format, start, compiled: as in `decode`.
        weight: factor on the decoded values.
        scratch: as in `encode`, apart from `out`.
    """
    eager = _DECODE_ADD[block_format.name]
    add_blocks = compiled_version(eager) if compiled else eager
    # As a tensor, so that a new weight is an input of the compiled code and not a constant in it.
    factor = torch.tensor(weight, dtype=torch.float32, device=out.device)
    fields = quantized_fields(payload, block_format)
    for tile in tiles((out,), fields, block_format, start=start, compiled=compiled, scratch=scratch, writes=True):
        kernel = eager if tile.padded else add_blocks
        scales, codes = tile.fields
        kernel(scales, codes, tile.vectors[0], factor, tile.scratch)


def block_kernels(block_format: BlockFormat) -> tuple[EncodeBlocks, DecodeBlocks]:
    """The kernels of one format, for callers that fuse them with work of their own.

    Returns:
        (x fp32 [N], scales, codes, noise key or None, scratch or None) → None, and (scales, codes, out fp32 [N]) → None; the
        fields are those of `quantized_fields`, N is B whole blocks.
    """
    return _ENCODE[block_format.name], _DECODE[block_format.name]


def encode_reference(x: Tensor, block_format: BlockFormat) -> Tensor:
    """The plain form of `encode` to nearest: fp32 [N] → uint8 payload. Slow, with whole-tensor temporaries."""
    num_blocks, size = block_format.num_blocks(x.numel()), block_format.block_size
    largest_code = 127 if block_format == Q8 else 7
    blocks = torch.zeros(num_blocks, size, device=x.device)
    blocks.view(-1)[: x.numel()] = x
    scales = (blocks.abs().amax(dim=1, keepdim=True) * (1 / largest_code)).bfloat16()
    step = scales.float()
    inverse = torch.where(step >= SMALLEST_NORMAL, 1 / step, torch.zeros_like(step))
    codes = (blocks * inverse).round().clamp(-largest_code, largest_code).to(torch.int8)
    if block_format == Q4:
        shifted = (codes + 7).view(torch.uint8)
        codes = (shifted[:, :32] + 16 * shifted[:, 32:]).view(torch.int8)
    return torch.cat([scales.view(torch.uint8).flatten(), codes.view(torch.uint8).flatten()])


def decode_reference(payload: Tensor, numel: int, block_format: BlockFormat) -> Tensor:
    """The plain form of `decode`: uint8 payload → fp32 [N]."""
    scales, codes = quantized_fields(payload, block_format)
    if block_format == Q4:
        codes = torch.cat([codes % 16, codes // 16], dim=1).to(torch.int8) - 7
    return (codes.float() * scales.float()).flatten()[:numel]


def _scale_blocks(
    blocks: Tensor, scales: Tensor, largest_code: int, key: Tensor | None, scratch: Tensor | None
) -> Tensor:
    """x [B, n] → scales bfloat16 [B, 1]; returns the codes, fp32 [B, n], in scratch.

    To nearest without clamping: scale ≥ (1 − 2⁻⁹)·max|x|/M, so that |x|/scale ≤ 127.25 or 7.02, which rounds to M.
    """
    # abs then amax: measured 4× faster than aminmax and 7× faster than the infinity norm, which torch does not vectorise.
    exact = torch.amax(torch.abs(blocks, out=scratch), dim=1, keepdim=True) * (1 / largest_code)
    # Rounding to bfloat16 lowers a value by 2⁻⁸ of itself at most, so that with the factor |x|/scale < M. The 2⁻²⁰ is for fp32.
    step = rounded_to_bfloat16(exact if key is None else exact * (1 + 2.0**-8 + 2.0**-20))
    scales.copy_(step)
    # A subnormal step has lost its precision and its inverse overflows: such a block becomes zero.
    inverse = torch.where(step >= SMALLEST_NORMAL, 1 / step, torch.zeros_like(step))
    scaled = torch.mul(blocks, inverse, out=scratch)
    if key is None:
        return torch.round(scaled, out=scratch)
    noisy = torch.add(scaled, noise(key, blocks.numel()).view(blocks.shape), out=scratch)
    return torch.floor(noisy, out=scratch)


def _q8_encode_blocks(x: Tensor, scales: Tensor, codes: Tensor, key: Tensor | None, scratch: Tensor | None) -> None:
    """x fp32 [N] → scales bfloat16 [B, 1], codes int8 [B, 256]."""
    shape = (
        len(scales),
        Q8.block_size,
    )  # in terms of one size: only then does compiled code fuse all steps into one pass
    scratch = None if scratch is None else scratch.view(shape)
    codes.copy_(_scale_blocks(x.view(shape), scales, 127, key, scratch))


def _q4_encode_blocks(x: Tensor, scales: Tensor, codes: Tensor, key: Tensor | None, scratch: Tensor | None) -> None:
    """x fp32 [N] → scales bfloat16 [B, 1], codes uint8 [B, 32]."""
    shape = len(scales), Q4.block_size
    scratch = None if scratch is None else scratch.view(shape)
    values = _scale_blocks(x.view(shape), scales, 7, key, scratch)
    pack_nibbles(torch.add(values, 7, out=scratch).to(torch.uint8), codes)


def _q8_decode_blocks(scales: Tensor, codes: Tensor, out: Tensor) -> None:
    """scales bfloat16 [B, 1], codes int8 [B, 256] → out fp32 [N]."""
    torch.mul(codes, scales.float(), out=out.view(len(scales), Q8.block_size))


def _q4_decode_blocks(scales: Tensor, codes: Tensor, out: Tensor) -> None:
    """scales bfloat16 [B, 1], codes uint8 [B, 32] → out fp32 [N]."""
    values = out.view(len(scales), Q4.block_size)
    work = None if torch.compiler.is_compiling() else values
    torch.mul(torch.sub(nibbles(codes, torch.float32, out=work), 7, out=work), scales.float(), out=values)


def _q8_decode_add_blocks(scales: Tensor, codes: Tensor, out: Tensor, weight: Tensor, scratch: Tensor | None) -> None:
    """out fp32 [N] += codes × (scales × weight); two operations, so that no route rounds only once."""
    shape = len(scales), Q8.block_size
    scratch = None if scratch is None else scratch.view(shape)
    out.view(shape).add_(torch.mul(codes, scales.float() * weight, out=scratch))


def _q4_decode_add_blocks(scales: Tensor, codes: Tensor, out: Tensor, weight: Tensor, scratch: Tensor | None) -> None:
    """out fp32 [N] += (codes − 7) × (scales × weight)."""
    shape = len(scales), Q4.block_size
    scratch = None if scratch is None else scratch.view(shape)
    values = torch.sub(nibbles(codes, torch.float32, out=scratch), 7, out=scratch)
    out.view(shape).add_(torch.mul(values, scales.float() * weight, out=scratch))


_ENCODE: dict[str, EncodeBlocks] = {
    "q8": _q8_encode_blocks,
    "q4": _q4_encode_blocks,
    "e3m0": e3m0_encode_blocks,
}
_DECODE: dict[str, DecodeBlocks] = {
    "q8": _q8_decode_blocks,
    "q4": _q4_decode_blocks,
    "e3m0": e3m0_decode_blocks,
}
_DECODE_ADD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]] = {
    "q8": _q8_decode_add_blocks,
    "q4": _q4_decode_add_blocks,
    "e3m0": e3m0_decode_add_blocks,
}


def quantized_fields(payload: Tensor, block_format: BlockFormat) -> tuple[Tensor, Tensor]:
    """Views of a payload: scales bfloat16 [B, 1] and codes, int8 [B, 256] or uint8 [B, 32]."""
    scales, codes = split_fields(payload, (2, block_format.block_bytes - 2))
    return scales.view(torch.bfloat16), codes.view(torch.int8) if block_format == Q8 else codes
