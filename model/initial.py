"""Initial weights that are the same bits on every machine, and the hash that proves it.

torch's generators are not stable between versions or devices, so the values come from numpy's Philox counter generator,
whose raw bit stream is fixed: each 32-bit word gives an odd integer k with |k| < 2²⁴, which fp32 holds exactly, and one
correctly rounded multiplication by a constant scales it. The result is uniform in (−s√3, s√3), so its standard deviation is s.
Every parameter has its own stream, keyed by the seed and its name, so neither order nor layout matters.

Matrices have s = 0.02; the two projections that write to the residual stream have 0.02/√(2·num_layers), since that many
independent contributions add up in it. Norms start at one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.stage import Stage
from model.transformer import Transformer

__all__ = ["initial_sha256", "initialise", "weights_sha256"]

_STD = 0.02
_CHUNK = 1 << 20  # values drawn at a time; even, since one 64-bit word gives two
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


def initialise(model: Transformer | Stage, seed: int) -> None:
    """Set every parameter in place from the seed.

    Args:
        model: whole or one stage, on any device; parameters of any memory layout.
        seed: the run's seed, 0 ≤ seed < 2⁶³.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_initial(name, parameter.shape, seed=seed, num_layers=model.config.num_layers))


def initial_sha256(config: ModelConfig, seed: int) -> str:
    """`weights_sha256` of a model's initial weights, made one after the other: it takes the memory of the largest one."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
    weights = ((name, _initial(name, shapes[name], seed=seed, num_layers=config.num_layers)) for name in sorted(shapes))
    return _sha256(weights)


def _initial(name: str, shape: torch.Size, *, seed: int, num_layers: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    std = _STD / math.sqrt(2 * num_layers) if name.endswith(_RESIDUAL_OUTPUTS) else _STD
    return _uniform(name, seed, shape.numel(), std).view(shape)


def _uniform(name: str, seed: int, num_values: int, std: float) -> Tensor:
    key = hashlib.sha256(f"llm-node:initial\0{seed}\0{name}".encode()).digest()[:16]
    stream = np.random.Philox(key=int.from_bytes(key, "little"))
    scale = np.float32(std * math.sqrt(3.0) * 2.0**-24)
    values = np.empty(num_values, dtype=np.float32)
    for start in range(0, num_values, _CHUNK):
        part = values[start : start + _CHUNK]
        words = stream.random_raw((len(part) + 1) // 2)
        high, low = words >> np.uint64(40), (words & np.uint64(0xFFFFFFFF)) >> np.uint64(8)
        integers = np.stack((high, low), axis=1).reshape(-1)[: len(part)].astype(np.int32)
        np.multiply((2 * integers + 1 - (1 << 24)).astype(np.float32), scale, out=part)
    return torch.from_numpy(values)


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and little-endian fp32 values, in the order of the names.

    Args:
        weights: fp32 tensors by name.

    Returns:
        64 hexadecimal digits.
    """
    return _sha256((name, weights[name].detach()) for name in sorted(weights))


def _sha256(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights:
        assert tensor.dtype == torch.float32, "initial weights are fp32"
        digest.update(f"{name}\0{'x'.join(map(str, tensor.shape))}\0".encode())
        flat = tensor.cpu().contiguous().view(-1)
        for start in range(0, flat.numel(), _CHUNK):
            digest.update(flat[start : start + _CHUNK].numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()
