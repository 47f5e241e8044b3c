"""8-bit blockwise quantisation (format Q8), the wire format of Δ.

    payload = scales (bfloat16, one per block, little-endian) | codes (int8, 256 per block, the last block padded with 0)
    scale   = bfloat16(max|x| / 127)        code = round-half-even(x / scale)        value = code × scale

Codes are computed from the rounded scale, so the scale's own rounding adds no error. Rounding is to nearest, not
stochastic: whoever sends Δ carries the error over to the next round (error feedback), which is unbiased over time
and less noisy. A block that holds NaN or Inf decodes to a block that holds NaN or Inf; receivers must check.

Each kernel is one plain function over whole blocks, used twice: eagerly, tile by tile with a scratch tile that stays in
cache (whole-tensor temporaries would cost three times the time), and through torch.compile over the whole slice.
`q8_encode_reference` and `q8_decode_reference` say the same in the most obvious way, for the tests.

Shape legend: N elements, B blocks of 256.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.dispatch import compiled_version, tile_numel
from kernels.formats import Q8

__all__ = [
    "q8_decode",
    "q8_decode_add",
    "q8_decode_reference",
    "q8_encode",
    "q8_encode_reference",
    "q8_num_bytes",
]

_BLOCK = Q8.block_size
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def q8_num_bytes(numel: int) -> int:
    """Exact payload bytes for `numel` elements."""
    return Q8.num_bytes(numel)


def q8_encode(x: Tensor, *, out: Tensor, start: int = 0, scratch: Tensor | None = None, compiled: bool = False) -> None:
    """Encode a tensor, or one slice of it, into a payload.

    Args:
        x: fp32 [N], contiguous.
        out: uint8 payload of the WHOLE tensor.
        start: position of x[0] in the whole tensor, a multiple of 256; x must end at a multiple of 256 or at the end.
        scratch: fp32 working memory of at least one tile (`dispatch.tile_numel`) or N, contiguous, apart from x; allocated
            when absent.
        compiled: take the compiled route (same bytes).
    """
    encode = compiled_version(_encode_blocks) if compiled else _encode_blocks
    scratch = None if compiled else _working_memory(scratch, x)
    for values, scales, codes in _tiles(x, out, start, compiled):
        encode(values, scales, codes, None if scratch is None else scratch[: values.numel()])
    if tail := x.numel() % _BLOCK:
        _encode_blocks(_padded(x[-tail:]), *_last_block(out))


def q8_decode(payload: Tensor, out: Tensor, *, start: int = 0, compiled: bool = False) -> None:
    """Decode a payload, or one slice of it: out ← values.

    Args:
        payload: uint8 payload of the WHOLE tensor; its length must be `q8_num_bytes` of that tensor.
        out: fp32 [N], contiguous.
        start: position of out[0] in the whole tensor, a multiple of 256; the slice ends at a multiple of 256 or the end.
        compiled: take the compiled route (same values).
    """
    decode = compiled_version(_decode_blocks) if compiled else _decode_blocks
    for values, scales, codes in _tiles(out, payload, start, compiled):
        decode(scales, codes, values)
    if tail := out.numel() % _BLOCK:
        padded = _padded(out[-tail:])
        _decode_blocks(*_last_block(payload), padded)
        out[-tail:] = padded[:tail]


def q8_decode_add(
    payload: Tensor,
    out: Tensor,
    *,
    weight: float,
    start: int = 0,
    scratch: Tensor | None = None,
    compiled: bool = False,
) -> None:
    """Decode and accumulate: out ← out + code × (scale × weight).

    Args:
        payload, out, start, compiled: as in `q8_decode`.
        weight: factor on the decoded values.
        scratch: as in `q8_encode`, apart from `out`.
    """
    add = compiled_version(_decode_add_blocks) if compiled else _decode_add_blocks
    scratch = None if compiled else _working_memory(scratch, out)
    # As a tensor, so that a new weight is an input of the compiled code and not a constant in it.
    factor = torch.tensor(weight, dtype=torch.float32, device=out.device)
    for values, scales, codes in _tiles(out, payload, start, compiled):
        add(scales, codes, values, factor, None if scratch is None else scratch[: values.numel()])
    if tail := out.numel() % _BLOCK:
        padded = _padded(out[-tail:])
        _decode_add_blocks(*_last_block(payload), padded, factor)
        out[-tail:] = padded[:tail]


def q8_encode_reference(x: Tensor) -> Tensor:
    """The plain form of `q8_encode`: fp32 [N] → uint8 payload. Slow, with whole-tensor temporaries."""
    num_blocks = Q8.num_blocks(x.numel())
    padded = torch.zeros(num_blocks * _BLOCK, device=x.device)
    padded[: x.numel()] = x
    blocks = padded.view(num_blocks, _BLOCK)
    scales = (blocks.abs().amax(dim=1) * (1 / Q8.max_code)).bfloat16()
    step = scales.float()
    inverse = torch.where(step >= _SMALLEST_NORMAL, 1 / step, torch.zeros_like(step))
    codes = (blocks * inverse[:, None]).round().clamp(-Q8.max_code, Q8.max_code).to(torch.int8)
    return torch.cat([scales.view(torch.uint8), codes.flatten().view(torch.uint8)])


def q8_decode_reference(payload: Tensor, numel: int) -> Tensor:
    """The plain form of `q8_decode`: uint8 payload → fp32 [N]."""
    scales, codes = _fields(payload)
    return (codes.view(-1, _BLOCK).float() * scales.float()[:, None]).flatten()[:numel]


def _encode_blocks(x: Tensor, scales: Tensor, codes: Tensor, scratch: Tensor | None = None) -> None:
    """x fp32 [N] → scales bfloat16 [B], codes int8 [N], with N = 256·B.

    Without clamping: scale ≥ (1 − 2⁻⁹)·max|x|/127, so that |x|/scale ≤ 127.25, which rounds to 127.
    """
    shape = (
        scales.numel(),
        _BLOCK,
    )  # here and in terms of one size: only then does compiled code fuse all steps into one pass
    blocks = x.view(shape)
    scratch = None if scratch is None else scratch.view(shape)
    # abs then amax: measured 4× faster than aminmax and 7× faster than the infinity norm, which torch does not vectorise.
    step = _rounded_to_bfloat16(torch.amax(torch.abs(blocks, out=scratch), dim=1) * (1 / Q8.max_code))
    scales.copy_(step)
    # A subnormal step has lost its precision and its inverse overflows: such a block (max|x| < 1.5e-36) becomes zero.
    inverse = torch.where(step >= _SMALLEST_NORMAL, 1 / step, torch.zeros_like(step))
    scaled = torch.mul(blocks, inverse[:, None], out=scratch)
    codes.view(shape).copy_(torch.round(scaled, out=scratch))


def _rounded_to_bfloat16(x: Tensor) -> Tensor:
    """Non-negative fp32 values rounded half-even to bfloat16's precision, in fp32.

    By integer arithmetic, since torch.compile drops a cast to bfloat16 and back, and would take the unrounded scale.
    """
    bits = x.view(torch.int32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    return torch.where(x < torch.inf, rounded, x)  # the carry would turn some NaN into zero


def _decode_blocks(scales: Tensor, codes: Tensor, out: Tensor) -> None:
    """scales bfloat16 [B], codes int8 [N] → out fp32 [N]."""
    shape = scales.numel(), _BLOCK
    torch.mul(codes.view(shape), scales.float()[:, None], out=out.view(shape))


def _decode_add_blocks(
    scales: Tensor, codes: Tensor, out: Tensor, weight: Tensor, scratch: Tensor | None = None
) -> None:
    """out fp32 [N] += codes × (scales × weight); two operations, so that no route rounds only once."""
    shape = scales.numel(), _BLOCK
    scratch = None if scratch is None else scratch.view(shape)
    value = torch.mul(codes.view(shape), (scales.float() * weight)[:, None], out=scratch)
    out.view(shape).add_(value)


def _fields(payload: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a payload: scales bfloat16 [B] and codes int8 [256·B]."""
    split = payload.numel() // (_BLOCK + Q8.scale_bytes) * Q8.scale_bytes
    return payload[:split].view(torch.bfloat16), payload[split:].view(torch.int8)


def _tiles(x: Tensor, payload: Tensor, start: int, compiled: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(values, scales, codes) of the whole blocks in slice x. Compiled code takes them all at once: it keeps intermediate
    values in registers."""
    scales, codes = _fields(payload)
    assert payload.dtype == torch.uint8, "a payload is uint8"
    assert start % _BLOCK == 0, f"a slice must start at a multiple of {_BLOCK}, not at {start}"
    end = start + Q8.num_blocks(x.numel()) * _BLOCK
    assert end <= codes.numel(), "slice lies beyond the payload"
    assert x.numel() % _BLOCK == 0 or end == codes.numel(), "only the last block may be short"
    whole = x.numel() // _BLOCK * _BLOCK
    step = max(whole, 1) if compiled else tile_numel(x.device)
    for begin in range(0, whole, step):
        end = min(begin + step, whole)
        first, last = start + begin, start + end
        yield x[begin:end], scales[first // _BLOCK : last // _BLOCK], codes[first:last]


def _last_block(payload: Tensor) -> tuple[Tensor, Tensor]:
    scales, codes = _fields(payload)
    return scales[-1:], codes[-_BLOCK:]


def _padded(tail: Tensor) -> Tensor:
    """A whole block that begins with `tail`."""
    block = tail.new_zeros(_BLOCK)
    block[: tail.numel()] = tail
    return block


def _working_memory(scratch: Tensor | None, x: Tensor) -> Tensor:
    return torch.empty(min(x.numel(), tile_numel(x.device)), device=x.device) if scratch is None else scratch
