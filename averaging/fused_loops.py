"""The loops of averaging/fused.py, plain functions over whole blocks that torch.compile turns into one pass over memory each.

Shape legend: N elements, B blocks of n = 256 (q4: 64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from averaging.codec import CAST_TYPES
from averaging.outer import OuterConfig
from averaging.window import LatticeWindow
from kernels.formats import Q4, Q8
from kernels.lattice import WINDOW, read_blocks, write_blocks
from kernels.quantize import block_kernels

__all__ = ["BLOCK", "QUANTIZED", "Fields", "Four", "measure", "pack", "packed_theta", "step"]

Fields = tuple[Tensor, ...]
"""The parts of a payload, [B, …] each, or [N] where values are plain."""
Four = tuple[Tensor, Tensor, Tensor, Tensor]
"""θ, φ, δ and anchor, fp32 [N]; with pair averaging the last two are empty."""

BLOCK = 256
"""Elements per block where the codec has none of its own."""
QUANTIZED = {"q8": Q8, "q4": Q4}


def pack(
    codec: str, vectors: Four, fields: Fields, distance: Tensor, drift: Tensor, numel: int, weights: Tensor
) -> Tensor:
    """θ → fields; anchor, or φ if that is empty, ← θ; distance rises to what moved. Returns Σ Δ², [B]."""
    theta, phi, _, _ = vectors
    blocks = _blocks(theta, codec)
    delta = blocks - _blocks(phi, codec)
    squares = torch.sum(delta * delta, dim=1)
    if codec == "lattice":
        moved = torch.sqrt(squares / numel)[:, None]
        size = torch.sqrt(torch.sum(blocks * blocks, dim=1) / numel)[:, None]
        wanted = LatticeWindow.wanted(distance, moved=moved, size=size, drift=drift)
        distance.copy_(wanted)
        largest = torch.amax(torch.abs(blocks), dim=1, keepdim=True)
        steps, checksums, codes = fields
        write_blocks(blocks, largest, wanted * (WINDOW / 8), steps, checksums, codes, weights)
    elif codec in QUANTIZED:
        encode, _ = block_kernels(QUANTIZED[codec])
        scales, codes = fields
        encode(theta, scales, codes, None, None)
    else:
        fields[0].copy_(theta)
    packed_theta(vectors).copy_(theta)
    return squares


def measure(codec: str, near: Tensor, ours: Fields, theirs: Fields, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (theirs − ours)² and which blocks are readable, [B] each."""
    values, readable = _read(codec, theirs, near, weights)
    difference = values - _own(codec, ours, near, weights)
    squares = torch.sum(difference * difference, dim=1)
    return torch.where(readable, squares, torch.zeros_like(squares)), readable


def step(
    codec: str,
    vectors: Four,
    fields: tuple[Fields, ...],
    factors: tuple[Tensor, ...],
    scales: Tensor,
    outer: OuterConfig,
    keep: float,
    weights: Tensor,
) -> Tensor:
    """θ, φ and δ take the step; returns Σ (φ' − anchor)², [B].

    Args:
        vectors: θ, φ, δ, anchor, fp32 [N]; the last two are empty with pair averaging.
        factors: on the partners' pulls, 0-dimensional each.
        scales: factors on φ's step and on δ, fp32 [2]; with pair averaging the former is in `factors`.
    """
    theta, phi, momentum, _ = vectors
    near = packed_theta(vectors)
    packed, ours = _blocks(near, codec), _own(codec, fields[0], near, weights)
    pull = torch.zeros_like(packed)
    for theirs, factor in zip(fields[1:], factors, strict=True):
        values, readable = _read(codec, theirs, near, weights)
        pull = pull + torch.where(readable[:, None], values - ours, torch.zeros_like(ours)) * factor
    if momentum.numel():
        before = _blocks(phi, codec)
        velocity = _blocks(momentum, codec) * outer.alpha + (packed - before) * outer.beta + pull * outer.gamma
        moved = before + velocity * scales[0]
        momentum.copy_((velocity * scales[1]).view(-1))
    else:
        moved = packed + pull
    shift = moved - packed
    now = _blocks(theta, codec)
    theta.copy_(((now - packed) + moved if keep == 1.0 else now + shift * keep).view(-1))
    phi.copy_(moved.view(-1))
    return torch.sum(shift * shift, dim=1)


def packed_theta(vectors: Four) -> Tensor:
    """Where θ is kept as it was packed: the anchor, or φ."""
    return vectors[3] if vectors[3].numel() else vectors[1]


def _blocks(x: Tensor, codec: str) -> Tensor:
    return x.view(-1, Q4.block_size if codec == "q4" else BLOCK)


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
        _, decode = block_kernels(QUANTIZED[codec])
        scales, codes = fields
        decode(scales, codes, out)
        values = _blocks(out, codec)
    return values, torch.ones_like(values[:, 0], dtype=torch.bool)


def _own(codec: str, fields: Fields, near: Tensor, weights: Tensor) -> Tensor:
    """Our own values as they travelled, [B, n]. fp32 and the lattice need no codes: `near` is what was encoded."""
    if codec == "fp32":
        return _blocks(near, codec)
    if codec != "lattice":
        return _read(codec, fields, near, weights)[0]
    step = fields[0].float()
    return torch.round(_blocks(near, codec) * (1 / step)) * step
