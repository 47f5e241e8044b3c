"""How a flat fp32 vector becomes bytes on the wire, all little-endian.

| name    | bytes per value | what                                                         | Δ | φ, θ |
|---------|-----------------|--------------------------------------------------------------|---|------|
| fp32    | 4               | as it is                                                     | x | x    |
| bf16    | 2               | 8 significant bits                                           | x | x    |
| q8      | 1.008           | 8-bit integers, a scale per 256                              | x | x    |
| q4      | 0.531           | 4-bit integers, a scale per 64                               | x | x    |
| e3m0    | 0.531           | sign and power of two, a scale per 64                        | x |      |
| topk    | 0.028           | the 64 largest of 4096, at two levels                        | x |      |
| lattice | 0.516           | where in a window a value lies; needs a receiver that is near |   | x    |

The byte count follows from the number of elements alone, so it comes from the manifest and never from the wire. Decoding
checks nothing but the length: values may be NaN or huge, and judging them is admission's work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from averaging.codec_blocks import E3M0Codec, LatticeCodec, Q4Codec, Q8Codec, Rounding, TopkCodec
from averaging.codec_interface import Bf16Codec, Codec, Fp32Codec
from protocol.errors import ProtocolError

__all__ = ["CAST_TYPES", "DELTA_CODECS", "SLOW_CODECS", "Codec", "Rounding", "codec_named", "payload_tensor"]

DELTA_CODECS = ("fp32", "bf16", "q8", "q4", "e3m0", "topk")
"""Formats for Δ. The lattice is not among them: partners' Δ are not near each other."""

SLOW_CODECS = ("fp32", "bf16", "q8", "q4", "lattice")
"""Formats for φ and θ, which are never sparsified."""

CAST_TYPES = {codec.name: codec.dtype for codec in (Fp32Codec, Bf16Codec)}
"""Formats that are nothing but a floating-point type."""


def codec_named(name: str, *, compiled: bool = False, rounding: Rounding = "nearest") -> Codec:
    """The codec that a manifest names.

    Args:
        name: one of DELTA_CODECS or SLOW_CODECS.
        compiled: whether codecs with kernels of their own take the compiled route.
        rounding: stochastic for q8 and q4 where no error feedback carries over what rounding loses.

    Raises:
        ValueError: unknown name, or a codec that has no stochastic rounding.
    """
    if rounding == "stochastic" and name not in ("q8", "q4"):
        raise ValueError(f"codec {name!r} has no stochastic rounding; use q8 or q4, or rounding='nearest'")
    match name:
        case "fp32":
            return Fp32Codec()
        case "bf16":
            return Bf16Codec()
        case "q8":
            return Q8Codec(compiled=compiled, rounding=rounding)
        case "q4":
            return Q4Codec(compiled=compiled, rounding=rounding)
        case "e3m0":
            return E3M0Codec(compiled=compiled)
        case "topk":
            return TopkCodec(compiled=compiled)
        case "lattice":
            return LatticeCodec(compiled=compiled)
    known = ", ".join(dict.fromkeys(DELTA_CODECS + SLOW_CODECS))
    raise ValueError(f"unknown codec {name!r}; known are {known}")


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
