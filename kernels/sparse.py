"""Top-k with two levels: of every 4096 values the 64 largest travel, at two bits each (format TOPK; SparseLoCo, arXiv 2508.15706).

    payload = levels (2 × bfloat16 per chunk: large, small) | codes (16 bytes: 64 × 2 bits) | indices (96 bytes: 64 × 12 bits)
    code    = sign | level << 1, four to a byte, the first in the lowest bits; level 0 is the large one
    indices = two in three bytes: low(a), high(a) | low 4 bits of b << 4, b >> 4

The k values, sorted by magnitude, are cut in two where the squared error is smallest, and each part is sent as its mean. All 63
cuts are tried, so the levels are the best two. The last chunk is padded with zeros; indices into the padding are skipped.

What was not sent is most of the vector: without error feedback this format is useless. Twelve bits can not point
outside a chunk, so hostile bytes do no harm; an index that occurs twice counts twice, in `topk_decode` as in
`topk_decode_add`. A chunk that holds NaN or Inf decodes to one that holds NaN or Inf.

No route through torch.compile: selection takes nearly all the time, and it is torch's own routine either way. kernels/sparse.c
selects eight times as fast, and gives the same bytes where no two values of a chunk have the same size.

Shape legend: N elements, C chunks of 4096.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.blocks import SMALLEST_NORMAL, split_fields, tiles
from kernels.formats import TOPK
from kernels.native import compiled_library

__all__ = ["NUM_KEPT", "topk_decode", "topk_decode_add", "topk_encode"]

SOURCE = Path(__file__).with_name("sparse.c")
NUM_KEPT = 64
"""Values that travel per chunk."""

_CHUNK = TOPK.block_size
_DEPTH = 8
_FIELDS = 4, 16, 96


def topk_encode(x: Tensor, *, out: Tensor, start: int = 0, scratch: Tensor | None = None, native: bool = False) -> None:
    """Encode a tensor, or one slice of it, into a payload.

    Args:
        x: fp32 [N], contiguous.
        out: uint8 payload of the WHOLE tensor.
        start: position of x[0] in the whole tensor, a multiple of 4096; x must end at a multiple of 4096 or at the end.
        scratch: fp32 working memory of at least one tile (`dispatch.tile_numel`) or N, apart from x; allocated when absent.
        native: in C, where there is a compiler and the tensors are on the CPU.
    """
    if native and (library := _library(x, out)) is not None:
        assert start % _CHUNK == 0
        assert -(-(start + x.numel()) // _CHUNK) * TOPK.block_bytes <= out.numel(), "slice lies beyond the payload"
        library.llm_node_topk_encode(x.data_ptr(), x.numel(), out.data_ptr(), out.numel() // TOPK.block_bytes, start)
        return
    for tile in tiles((x,), _fields(out), TOPK, start=start, compiled=False, scratch=scratch):
        levels, codes, indices = tile.fields
        _encode_chunks(tile.vectors[0], levels, codes, indices, tile.scratch)


def topk_decode(payload: Tensor, out: Tensor, *, start: int = 0, native: bool = False) -> None:
    """Decode a payload, or one slice of it: out ← values, zero where none was sent.

    Args:
        payload: uint8 payload of the WHOLE tensor.
        out: fp32 [N], contiguous.
        start, native: as in `topk_encode`; start is the position of out[0].
    """
    topk_decode_add(payload, out.zero_(), weight=1.0, start=start, native=native)


def topk_decode_add(payload: Tensor, out: Tensor, *, weight: float, start: int = 0, native: bool = False) -> None:
    """Decode and accumulate: out ← out + weight × values; touches only the values that were sent.

    Args:
        payload, out, start, native: as in `topk_decode`.
        weight: factor on the decoded values.
    """
    if native and (library := _library(payload, out)) is not None:
        assert start % _CHUNK == 0
        num_chunks = payload.numel() // TOPK.block_bytes
        assert -(-(start + out.numel()) // _CHUNK) <= num_chunks, "slice lies beyond the payload"
        library.llm_node_topk_add(payload.data_ptr(), num_chunks, start, out.data_ptr(), out.numel(), weight)
        return
    _scatter(payload, out, start, weight=weight)


def _encode_chunks(x: Tensor, levels: Tensor, codes: Tensor, indices: Tensor, scratch: Tensor | None) -> None:
    """x fp32 [N] → levels bfloat16 [C, 2], codes uint8 [C, 16], indices uint8 [C, 96]."""
    chunks = x.view(len(levels), _CHUNK)
    size = torch.abs(chunks, out=None if scratch is None else scratch.view(chunks.shape))
    kept, positions = _largest(size)
    num_large, pair = _best_levels(kept)
    levels.copy_(pair)
    is_small = torch.arange(NUM_KEPT, device=x.device) >= num_large
    code = (torch.gather(chunks, 1, positions) < 0).to(torch.uint8) | (is_small.to(torch.uint8) << 1)
    first, second, third, fourth = code.view(-1, NUM_KEPT // 4, 4).unbind(dim=2)
    codes.copy_(first | second << 2 | third << 4 | fourth << 6)
    even, odd = positions.view(-1, NUM_KEPT // 2, 2).unbind(dim=2)
    indices.view(-1, NUM_KEPT // 2, 3).copy_(torch.stack((even & 255, even >> 8 | (odd & 15) << 4, odd >> 4), dim=2))


def _largest(size: Tensor) -> tuple[Tensor, Tensor]:
    """The 64 largest of every row of [C, 4096], NaN first, then descending, and their positions.

    In two stages: all of them lie in the 64 columns of largest maximum when a row is laid out as 8 × 512, so that torch selects
    among 512 twice and never among 4096. Measured 1.6× faster than one `topk`.
    """
    rows = size.view(-1, _DEPTH, _CHUNK // _DEPTH)
    columns = torch.topk(torch.amax(rows, dim=1), NUM_KEPT, dim=1, sorted=False).indices
    offsets = torch.arange(0, _CHUNK, _CHUNK // _DEPTH, device=size.device)
    positions = (columns.unsqueeze(1) + offsets.unsqueeze(1)).view(-1, NUM_KEPT * _DEPTH)
    kept, order = torch.topk(size.gather(1, positions), NUM_KEPT, dim=1)
    return kept, positions.gather(1, order)


def _best_levels(kept: Tensor) -> tuple[Tensor, Tensor]:
    """The cut of descending magnitudes [C, 64] in two parts whose means have the least squared error.

    That error is a constant less Σ (sum of a part)² / (its length). Returns the length of the first part [C, 1] and
    the two means [C, 2].
    """
    largest = kept[:, :1].clamp(min=SMALLEST_NORMAL)
    unit = kept / largest  # squares can then not overflow
    length = torch.arange(1, NUM_KEPT, device=kept.device)
    first = unit.cumsum(dim=1)
    second = (first[:, -1:] - first)[:, :-1]
    first = first[:, :-1]
    gain = first.square() / length + second.square() / (NUM_KEPT - length)
    num_large = gain.argmax(dim=1, keepdim=True) + 1
    at = num_large - 1
    means = torch.cat((first.gather(1, at) / num_large, second.gather(1, at) / (NUM_KEPT - num_large)), dim=1)
    return num_large, means * largest


def _scatter(payload: Tensor, out: Tensor, start: int, *, weight: float) -> None:
    """Add weight × values to out at their places."""
    for tile in tiles((out,), _fields(payload), TOPK, start=start, compiled=False, writes=True):
        levels, codes, indices = tile.fields
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=out.device)
        code = (codes.unsqueeze(2) >> shifts).view(-1, NUM_KEPT).long()
        size = (levels.float() * weight).gather(1, code >> 1 & 1)
        one, two, three = indices.view(-1, NUM_KEPT // 2, 3).long().unbind(dim=2)
        positions = torch.stack((one | (two & 15) << 8, two >> 4 | three << 4), dim=2).view(-1, NUM_KEPT)
        tile.vectors[0].view(-1, _CHUNK).scatter_add_(1, positions, torch.where(code & 1 == 1, -size, size))


def _fields(payload: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a payload: levels bfloat16 [C, 2], codes uint8 [C, 16], indices uint8 [C, 96]."""
    levels, codes, indices = split_fields(payload, _FIELDS)
    return levels.view(torch.bfloat16), codes, indices


def _library(*tensors: Tensor) -> ctypes.CDLL | None:
    """kernels/sparse.c, if it can be used for these."""
    if any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in tensors):
        return None
    library = compiled_library(SOURCE)
    if library is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        library.llm_node_topk_encode.argtypes = pointer, integer, pointer, integer, integer
        library.llm_node_topk_add.argtypes = pointer, integer, integer, pointer, integer, ctypes.c_float
        for function in (library.llm_node_topk_encode, library.llm_node_topk_add):
            function.restype = None
    return library
