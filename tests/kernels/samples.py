"""Vectors and round trips that the kernel tests share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels import quantize
from kernels.dispatch import tile_numel
from kernels.formats import BlockFormat

__all__ = ["SIZES", "TILE", "block_maxima", "decoded", "encoded", "gradient_like"]

TILE = tile_numel(torch.device("cpu"))
SIZES = [1, 63, 64, 255, 256, 257, 5000, TILE, TILE + 1, 2 * TILE + 777]


def gradient_like(numel: int, seed: int = 0) -> Tensor:
    """Values over many magnitudes, some exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * 10 ** (torch.rand(numel, generator=generator) * 6 - 7)
    return x * (torch.rand(numel, generator=generator) > 0.1)


def encoded(x: Tensor, block_format: BlockFormat, *, compiled: bool = False, seed: int | None = None) -> Tensor:
    """The payload; it held other bytes before, which must all be overwritten."""
    payload = torch.full((block_format.num_bytes(x.numel()),), 0xA5, dtype=torch.uint8)
    quantize.encode(x, block_format, out=payload, compiled=compiled, seed=seed)
    return payload


def decoded(payload: Tensor, numel: int, block_format: BlockFormat, *, compiled: bool = False) -> Tensor:
    """The values of a payload."""
    out = torch.full((numel,), torch.nan)
    quantize.decode(payload, out, block_format, compiled=compiled)
    return out


def block_maxima(x: Tensor, block_format: BlockFormat) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Largest absolute value of every block, the last one padded with zeros."""
    padded = np.zeros((block_format.num_blocks(x.numel()), block_format.block_size))
    padded.reshape(-1)[: x.numel()] = x.double().numpy()
    maxima: np.ndarray[tuple[int], np.dtype[np.float64]] = np.abs(padded).max(axis=1)
    return maxima
