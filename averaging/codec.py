"""How a flat fp32 vector becomes bytes on the wire: fp32, bf16 or q8, all little-endian.

The byte count follows from the number of elements alone, so it comes from the manifest and never from the wire. All methods
work on slices, tile by tile, into buffers that exist already. Decoding checks nothing but the length: values may be NaN
or huge, and judging them is admission's work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from kernels.quantize import q8_decode, q8_decode_add, q8_encode, q8_num_bytes
from protocol.errors import ProtocolError

__all__ = ["Bf16Codec", "Codec", "Fp32Codec", "Q8Codec", "codec_named", "payload_tensor"]


class Codec(ABC):
    """One wire format. In all methods `payload` is the uint8 payload of the WHOLE vector, and `start` is where the given slice
    begins in that vector: a multiple of 256; only the last slice may have a length that is not."""

    name: ClassVar[str]
    lossy: ClassVar[bool]
    """Whether decoding may give other values than were encoded."""

    @abstractmethod
    def num_bytes(self, numel: int) -> int:
        """Exact payload length for `numel` elements."""

    @abstractmethod
    def encode(self, x: Tensor, payload: Tensor, *, start: int = 0, scratch: Tensor | None = None) -> None:
        """Write x (fp32 [n]) into the payload; `scratch` is fp32 [≥ n] working memory apart from x."""

    @abstractmethod
    def decode(self, payload: Tensor, out: Tensor, *, start: int = 0) -> None:
        """out (fp32 [n]) ← decoded slice."""

    @abstractmethod
    def decode_add(
        self, payload: Tensor, out: Tensor, *, weight: float, start: int = 0, scratch: Tensor | None = None
    ) -> None:
        """out (fp32 [n]) ← out + weight × decoded slice; `scratch` is fp32 [≥ n] apart from out."""


class _CastCodec(Codec):
    """A plain floating-point type."""

    dtype: ClassVar[torch.dtype]

    def num_bytes(self, numel: int) -> int:
        return numel * self.dtype.itemsize

    def encode(self, x: Tensor, payload: Tensor, *, start: int = 0, scratch: Tensor | None = None) -> None:
        self._slice(payload, start, x.numel()).copy_(x)

    def decode(self, payload: Tensor, out: Tensor, *, start: int = 0) -> None:
        out.copy_(self._slice(payload, start, out.numel()))

    def decode_add(
        self, payload: Tensor, out: Tensor, *, weight: float, start: int = 0, scratch: Tensor | None = None
    ) -> None:
        out.add_(self._slice(payload, start, out.numel()), alpha=weight)

    def _slice(self, payload: Tensor, start: int, numel: int) -> Tensor:
        return payload.view(self.dtype)[start : start + numel]


class Fp32Codec(_CastCodec):
    """Four bytes per element, exact."""

    name = "fp32"
    lossy = False
    dtype = torch.float32


class Bf16Codec(_CastCodec):
    """Two bytes per element, 8 significant bits, the range of fp32."""

    name = "bf16"
    lossy = True
    dtype = torch.bfloat16


class Q8Codec(Codec):
    """1.008 bytes per element, see kernels/quantize.py.

    Args:
        compiled: run the kernels through torch.compile (same bytes, half a minute at the first use).
    """

    name = "q8"
    lossy = True

    def __init__(self, *, compiled: bool = False) -> None:
        self._compiled = compiled

    def num_bytes(self, numel: int) -> int:
        return q8_num_bytes(numel)

    def encode(self, x: Tensor, payload: Tensor, *, start: int = 0, scratch: Tensor | None = None) -> None:
        q8_encode(x, out=payload, start=start, scratch=scratch, compiled=self._compiled)

    def decode(self, payload: Tensor, out: Tensor, *, start: int = 0) -> None:
        q8_decode(payload, out, start=start, compiled=self._compiled)

    def decode_add(
        self, payload: Tensor, out: Tensor, *, weight: float, start: int = 0, scratch: Tensor | None = None
    ) -> None:
        q8_decode_add(payload, out, weight=weight, start=start, scratch=scratch, compiled=self._compiled)


def codec_named(name: str, *, compiled: bool = False) -> Codec:
    """The codec that a manifest names.

    Args:
        name: fp32, bf16 or q8.
        compiled: whether codecs with kernels of their own take the compiled route.

    Raises:
        ValueError: unknown name.
    """
    match name:
        case "fp32":
            return Fp32Codec()
        case "bf16":
            return Bf16Codec()
        case "q8":
            return Q8Codec(compiled=compiled)
    raise ValueError(f"unknown codec {name!r}; known are fp32, bf16, q8")


def payload_tensor(data: memoryview | bytes | bytearray, *, num_bytes: int, device: torch.device) -> Tensor:
    """A received payload as a uint8 tensor, without a copy where the buffer is writable and the device is the CPU.

    Raises:
        ProtocolError: the length is not `num_bytes`.
    """
    view = memoryview(data).cast("B")
    if view.nbytes != num_bytes:
        raise ProtocolError(f"payload of {view.nbytes} bytes where {num_bytes} were due")
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    # torch warns about read-only memory, which it can not represent; such a buffer is copied instead.
    buffer = bytearray(view) if view.readonly else view
    return torch.frombuffer(buffer, dtype=torch.uint8).to(device)
