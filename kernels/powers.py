"""Four bits that are a sign and a power of two (format E3M0).

    payload = scales (bfloat16, one per 64) | codes (32 bytes per block, see blocks.pack_nibbles)
    scale   = bfloat16(0.9 · max|x|)        code = sign << 3 | e        value = 0 for e = 0, else ± 2^(e − 7) · scale, e = 1 … 7

Rounding is to the nearest level; the middle between 0 and the smallest one lies where it lies between all others, at 3/4 of
the upper one, so that rounding is one addition to fp32's bits. The factor 0.9 was measured: the relative error of a Gaussian
is 0.185 (0.189 with 0.8 and with 1), that of a Student t with 3 degrees of freedom 0.166. Where Q4 has even steps, here the
levels crowd at zero, where most of a gradient lies. Exponents without a mantissa are what Streaming DiLoCo (arXiv
2501.18512) sends Δ in. Non-finite blocks decode to non-finite blocks.

`e3m0_decode_reference` and `e3m0_encode_reference` say the same in the most obvious way, for the tests.

Shape legend: N elements, B blocks of 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.blocks import SMALLEST_NORMAL, nibbles, pack_nibbles, rounded_to_bfloat16
from kernels.formats import E3M0

__all__ = [
    "e3m0_decode_add_blocks",
    "e3m0_decode_blocks",
    "e3m0_decode_reference",
    "e3m0_encode_blocks",
    "e3m0_encode_reference",
]

_TOP_OF_MAX = 0.9
_HALF_EXPONENT = 1 << 22
"""Half of fp32's mantissa range: added to the bits, it carries into the exponent from 1.5 on."""
_EXPONENT_OF_ZERO = 120
"""fp32's exponent field of 2⁻⁷, the place below the smallest level."""
_SIGN_AND_EXPONENT = -(1 << 31) | 0x3800000


def e3m0_encode_blocks(x: Tensor, scales: Tensor, codes: Tensor, key: Tensor | None, scratch: Tensor | None) -> None:
    """x fp32 [N] → scales bfloat16 [B, 1], codes uint8 [B, 32]. There is no stochastic form, so `key` is None."""
    assert key is None, "e3m0 rounds to nearest only"
    shape = len(scales), E3M0.block_size
    scratch = None if scratch is None else scratch.view(shape)
    blocks = x.view(shape)
    size = torch.abs(blocks, out=scratch)
    step = rounded_to_bfloat16(torch.amax(size, dim=1, keepdim=True) * _TOP_OF_MAX)
    scales.copy_(step)
    inverse = torch.where(step >= SMALLEST_NORMAL, 1 / step, torch.zeros_like(step))
    bits = torch.mul(size, inverse, out=scratch).view(torch.int32)
    exponent = (((bits + _HALF_EXPONENT) >> 23) - _EXPONENT_OF_ZERO).clamp(0, 7)
    sign = (blocks.view(torch.int32) >> 28) & 8
    pack_nibbles((exponent | sign).to(torch.uint8), codes)


def e3m0_decode_blocks(scales: Tensor, codes: Tensor, out: Tensor) -> None:
    """scales bfloat16 [B, 1], codes uint8 [B, 32] → out fp32 [N]."""
    values = out.view(len(scales), E3M0.block_size)
    work = None if torch.compiler.is_compiling() else values
    torch.mul(_units(codes, work), scales.float(), out=values)


def e3m0_decode_add_blocks(scales: Tensor, codes: Tensor, out: Tensor, weight: Tensor, scratch: Tensor | None) -> None:
    """out fp32 [N] += unit value × (scale × weight)."""
    shape = len(scales), E3M0.block_size
    scratch = None if scratch is None else scratch.view(shape)
    out.view(shape).add_(torch.mul(_units(codes, scratch), scales.float() * weight, out=scratch))


def e3m0_encode_reference(x: Tensor) -> Tensor:
    """fp32 [N] → uint8 payload, by comparing with the middle below every level."""
    num_blocks = E3M0.num_blocks(x.numel())
    blocks = torch.zeros(num_blocks, E3M0.block_size)
    blocks.view(-1)[: x.numel()] = x
    scales = (blocks.abs().amax(dim=1, keepdim=True) * _TOP_OF_MAX).bfloat16()
    step = scales.float()
    unit = blocks * torch.where(step >= SMALLEST_NORMAL, 1 / step, torch.zeros_like(step))
    levels = torch.tensor([0.0] + [2.0 ** (exponent - 7) for exponent in range(1, 8)])
    code = (unit.abs().unsqueeze(2) >= 0.75 * levels[1:]).sum(dim=2) + 8 * torch.signbit(blocks)
    packed = (code[:, :32] + 16 * code[:, 32:]).to(torch.uint8)
    return torch.cat([scales.view(torch.uint8).flatten(), packed.flatten()])


def e3m0_decode_reference(payload: Tensor, numel: int) -> Tensor:
    """uint8 payload → fp32 [N], by table."""
    num_blocks = payload.numel() // E3M0.block_bytes
    scales = payload[: 2 * num_blocks].view(torch.bfloat16).float()
    packed = payload[2 * num_blocks :].view(num_blocks, 32).long()
    levels = torch.tensor([0.0] + [2.0 ** (exponent - 7) for exponent in range(1, 8)])
    table = torch.cat([levels, -levels])
    return (table[torch.cat([packed % 16, packed // 16], dim=1)] * scales.unsqueeze(1)).flatten()[:numel]


def _units(codes: Tensor, out: Tensor | None) -> Tensor:
    """Packed codes uint8 [B, 32] → their values before scaling, fp32 [B, 64], in out.

    A code is put where fp32 keeps sign and exponent. Exponent 0 without mantissa is zero; the others are 2¹²⁰ times too small.
    """
    ints = None if out is None else out.view(torch.int32)
    code = nibbles(codes, torch.int32, out=ints)
    shifted = torch.bitwise_right_shift(
        torch.bitwise_left_shift(code, 28, out=ints), 5, out=ints
    )  # sign 31, exponent 25 … 23
    bits = torch.bitwise_and(shifted, _SIGN_AND_EXPONENT, out=ints)
    return torch.mul(bits.view(torch.float32), 2.0**_EXPONENT_OF_ZERO, out=out)
