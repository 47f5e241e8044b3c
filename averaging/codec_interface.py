"""What every wire format offers, and the two that are plain floating-point types.

All methods work on slices, tile by tile, into buffers that exist already. Everything that only one format needs (the lattice's
motion and near, the seed of stochastic rounding) is an argument of all, so that callers treat every format alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Bf16Codec", "Codec", "Fp32Codec"]


class Codec(ABC):
    """One wire format. In all methods `payload` is the uint8 payload of the WHOLE vector, and `start` is where the given slice
    begins in that vector: a multiple of `block`; only the last slice may have a length that is not."""

    name: ClassVar[str]
    lossy: ClassVar[bool]
    """Whether decoding may give other values than were encoded."""
    block: ClassVar[int]
    """Elements that are encoded together; divides 4096."""

    @abstractmethod
    def num_bytes(self, numel: int) -> int:
        """Exact payload length for `numel` elements."""

    @abstractmethod
    def encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        start: int = 0,
        scratch: Tensor | None = None,
        motion: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        """Write a slice into the payload.

        Args:
            x: fp32 [n].
            payload: uint8, of the whole vector.
            start: where x begins.
            scratch: fp32 [≥ n] working memory apart from x and motion.
            motion: fp32 [n], how far x moved since it was last exchanged; sets the lattice's window, else unused.
            seed: of stochastic rounding, else unused.
        """

    @abstractmethod
    def decode(self, payload: Tensor, out: Tensor, *, start: int = 0, near: Tensor | None = None) -> int:
        """Read a slice: out ← decoded.

        Args:
            payload: uint8, of the whole vector.
            out: fp32 [n].
            start: where out begins.
            near: fp32 [n] apart from out, the receiver's own value when it encoded; only the lattice uses it.

        Returns:
            How many blocks could not be read, so that `near` stands in their place; always 0 but for the lattice.
        """

    def decode_add(
        self,
        payload: Tensor,
        out: Tensor,
        *,
        weight: float,
        start: int = 0,
        scratch: Tensor | None = None,
        near: Tensor | None = None,
    ) -> int:
        """Read and accumulate: out ← out + weight × decoded; `scratch` is fp32 [≥ n] apart from out, the rest as in `decode`."""
        value = torch.empty_like(out) if scratch is None else scratch[: out.numel()]
        num_unreadable = self.decode(payload, value, start=start, near=near)
        out.add_(value, alpha=weight)
        return num_unreadable


class CastCodec(Codec):
    """A plain floating-point type."""

    block = 1
    dtype: ClassVar[torch.dtype]

    def num_bytes(self, numel: int) -> int:
        return numel * self.dtype.itemsize

    def encode(
        self,
        x: Tensor,
        payload: Tensor,
        *,
        start: int = 0,
        scratch: Tensor | None = None,
        motion: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        self._slice(payload, start, x.numel()).copy_(x)

    def decode(self, payload: Tensor, out: Tensor, *, start: int = 0, near: Tensor | None = None) -> int:
        out.copy_(self._slice(payload, start, out.numel()))
        return 0

    def _slice(self, payload: Tensor, start: int, numel: int) -> Tensor:
        return payload.view(self.dtype)[start : start + numel]


class Fp32Codec(CastCodec):
    """Four bytes per element, exact."""

    name = "fp32"
    lossy = False
    dtype = torch.float32


class Bf16Codec(CastCodec):
    """Two bytes per element, 8 significant bits, the range of fp32."""

    name = "bf16"
    lossy = True
    dtype = torch.bfloat16
