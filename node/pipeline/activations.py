"""Activations and their gradients on the wire: fixed-size tensors in one of the run's codecs.

The size follows from the manifest, never from the peer, so a receiver knows how many bytes to read before the first one is
here. What a stranger sends may decode to anything: NaN, infinities, or values so large that they would ruin a batch. `decode`
refuses what is not finite or beyond a bound that no healthy activation comes near.
"""

from __future__ import annotations

import torch
from torch import Tensor

from averaging.codec import codec_named
from protocol.errors import ProtocolError

__all__ = ["ACTIVATION_CODECS", "ActivationCodec"]

ACTIVATION_CODECS = ("fp32", "bf16", "q8")
"""Formats for activations and gradients. q8 has a scale per 256 values, so rows may differ by orders of magnitude."""
MAX_RMS = 1e4
"""Largest root mean square of an honest activation or gradient; residual streams of trained models stay below a few hundred."""


class ActivationCodec:
    """Encodes tensors of one shape.

    Args:
        name: one of ACTIVATION_CODECS.
        shape: B, T, W.
    """

    def __init__(self, name: str, shape: tuple[int, int, int]) -> None:
        assert name in ACTIVATION_CODECS
        self._codec = codec_named(name)
        self._shape = shape
        self._numel = shape[0] * shape[1] * shape[2]
        self.num_bytes = self._codec.num_bytes(self._numel)

    def encode(self, tensor: Tensor) -> memoryview:
        """The bytes of an fp32 tensor [B, T, W]."""
        payload = torch.empty(self.num_bytes, dtype=torch.uint8)
        self._codec.encode(tensor.detach().to("cpu", torch.float32).reshape(-1).contiguous(), payload)
        return memoryview(payload.numpy().data).cast("B")

    def decode(self, data: memoryview | bytes | bytearray) -> Tensor:
        """What `encode` wrote, fp32 [B, T, W].

        Raises:
            ProtocolError: values that are not finite, or too large; nobody honest sends them.
        """
        payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        values = torch.empty(self._numel)
        self._codec.decode(payload, values)
        rms = float(values.square().mean().sqrt())
        if not rms <= MAX_RMS:  # also true of NaN
            raise ProtocolError("an activation or gradient is not finite or far too large")
        return values.view(self._shape)
