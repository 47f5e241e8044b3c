"""The wire formats with kernels of their own: they cut the vector into blocks and store each in a fixed number of bytes."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from averaging.codec_interface import Codec
from kernels import quantize
from kernels.formats import E3M0, LATTICE, Q4, Q8, TOPK, BlockFormat
from kernels.lattice import WINDOW, lattice_decode, lattice_encode
from kernels.sparse import topk_decode, topk_decode_add, topk_encode

__all__ = ["E3M0Codec", "LatticeCodec", "Q4Codec", "Q8Codec", "Rounding", "TopkCodec"]

Rounding = Literal["nearest", "stochastic"]


class ScaledCodec(Codec):
    """A scale per block and a small code per value, see kernels/quantize.py.

    Args:
        compiled: run the kernels through torch.compile (same bytes, half a minute at the first use).
        rounding: how values are rounded to codes; receivers need not know.
    """

    lossy = True
    block_format: ClassVar[BlockFormat]

    def __init__(self, *, compiled: bool = False, rounding: Rounding = "nearest") -> None:
        self._compiled, self._stochastic = compiled, rounding == "stochastic"

    def num_bytes(self, numel: int) -> int:
        return self.block_format.num_bytes(numel)

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
        quantize.encode(
            x,
            self.block_format,
            out=payload,
            start=start,
            scratch=scratch,
            compiled=self._compiled,
            seed=seed if self._stochastic else None,
        )

    def decode(self, payload: Tensor, out: Tensor, *, start: int = 0, near: Tensor | None = None) -> int:
        quantize.decode(payload, out, self.block_format, start=start, compiled=self._compiled)
        return 0

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
        quantize.decode_add(
            payload,
            out,
            self.block_format,
            weight=weight,
            start=start,
            scratch=scratch,
            compiled=self._compiled,
        )
        return 0


class Q8Codec(ScaledCodec):
    """Eight-bit integers."""

    name = "q8"
    block = Q8.block_size
    block_format = Q8


class Q4Codec(ScaledCodec):
    """Four-bit integers."""

    name = "q4"
    block = Q4.block_size
    block_format = Q4


class E3M0Codec(ScaledCodec):
    """Sign and power of two; rounds to nearest only."""

    name = "e3m0"
    block = E3M0.block_size
    block_format = E3M0


class TopkCodec(Codec):
    """The 64 largest of 4096 at two bits each, see kernels/sparse.py. Only of use with error feedback.

    Args:
        compiled: in C where there is a compiler.
    """

    name = "topk"
    lossy = True
    block = TOPK.block_size

    def __init__(self, *, compiled: bool = False) -> None:
        self._compiled = compiled

    def num_bytes(self, numel: int) -> int:
        return TOPK.num_bytes(numel)

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
        topk_encode(x, out=payload, start=start, scratch=scratch, native=self._compiled)

    def decode(self, payload: Tensor, out: Tensor, *, start: int = 0, near: Tensor | None = None) -> int:
        topk_decode(payload, out, start=start, native=self._compiled)
        return 0

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
        topk_decode_add(payload, out, weight=weight, start=start, native=self._compiled)
        return 0


class LatticeCodec(Codec):
    """Four bits modulo a window, see kernels/lattice.py.

    Args:
        compiled: as in `ScaledCodec`.
        window: half-width of the window in units of rms(motion). Too small: blocks become unreadable. Too large: coarse.
    """

    name = "lattice"
    lossy = True
    block = LATTICE.block_size

    def __init__(self, *, compiled: bool = False, window: float = WINDOW) -> None:
        self._compiled, self._window = compiled, window

    def num_bytes(self, numel: int) -> int:
        return LATTICE.num_bytes(numel)

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
        lattice_encode(
            x,
            out=payload,
            motion=motion,
            window=self._window,
            start=start,
            scratch=scratch,
            compiled=self._compiled,
        )

    def decode(self, payload: Tensor, out: Tensor, *, start: int = 0, near: Tensor | None = None) -> int:
        return lattice_decode(payload, out, near=near, start=start, compiled=self._compiled)
