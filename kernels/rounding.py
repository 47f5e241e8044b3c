"""Noise for stochastic rounding: floor(value + noise) is the value on average, where rounding to nearest has a bias.

The noise is a hash of the element's position and a seed, not a random stream: tiles, slices and compiled code all give the same
bytes, nothing is stored, and it is ten times faster than `torch.rand`. The hash multiplies and xor-shifts (the constants are
those that Wellons' hash-prospector search found for "lowbias32"); int32 multiplication wraps, and a right shift is masked
since int32's is arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["noise", "noise_key"]

_MASK = 0xFFFFFFFF


def noise_key(seed: int, first: int, device: torch.device) -> Tensor:
    """What `noise` needs to know, int32 [2]: the hashed seed, and the position of its first element modulo 2³².

    The seed is hashed too: seeds 1 and 2 would otherwise give the same noise in another order. A tensor, so that
    compiled code takes it as an input and not as a constant.
    """
    mixed = seed & _MASK ^ (seed >> 32) & _MASK ^ 0x9E3779B9
    mixed = (mixed ^ mixed >> 16) * 0x7FEB352D & _MASK
    mixed = (mixed ^ mixed >> 15) * 0x846CA68B & _MASK
    signed = [value - (value >> 31 << 32) for value in (mixed ^ mixed >> 16, first & _MASK)]
    return torch.tensor(signed, dtype=torch.int32, device=device)


def noise(key: Tensor, numel: int) -> Tensor:
    """fp32 [numel], uniform on the 2¹⁶ numbers ½/2¹⁶, 1½/2¹⁶ … 1 − ½/2¹⁶: so coarse that |value| + noise is exact up to 127."""
    x = (torch.arange(numel, dtype=torch.int32, device=key.device) + key[1]) ^ key[0]
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return ((x >> 16) & 0xFFFF) * 2.0**-16 + 2.0**-17
