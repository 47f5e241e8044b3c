"""How one encoded vector is cut into parts without decoding it, and put together again.

A codec's payload is a row of planes (say: all scales, then all codes), and every plane has a fixed number of bytes per block. So
a slice of whole blocks is a slice of every plane, and those slices in a row are exactly the payload of that slice alone: a part
owner decodes its part like a small vector, and nobody encodes twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from averaging.codec import Codec

__all__ = ["Layout"]

_PLANES: dict[str, tuple[int, tuple[int, ...]]] = {
    "fp32": (1, (4,)),
    "bf16": (1, (2,)),
    "q8": (256, (2, 256)),
    "q4": (64, (2, 32)),
    "e3m0": (64, (2, 32)),
    "topk": (4096, (4, 16, 96)),
}
"""Codec name → (elements per block, bytes per block of each plane in payload order); see the codecs for what they hold."""

_CHECKED_NUMEL = 3 * 4096 + 1


@dataclass(frozen=True, slots=True)
class Layout:
    """The planes of one codec.

    Args:
        block: elements per block; parts begin at a multiple of it.
        planes: bytes per block of every plane.
    """

    block: int
    planes: tuple[int, ...]

    @classmethod
    def of(cls, codec: Codec) -> Self:
        """The layout of `codec`.

        Raises:
            ValueError: its payload can not be cut.
        """
        if codec.name not in _PLANES:
            raise ValueError(f"codec {codec.name!r} can not be cut into parts; known are {', '.join(_PLANES)}")
        layout = cls(*_PLANES[codec.name])
        assert layout.num_bytes(_CHECKED_NUMEL) == codec.num_bytes(_CHECKED_NUMEL), "the codec has changed its layout"
        return layout

    def num_bytes(self, numel: int) -> int:
        """Bytes of an encoded vector of `numel` elements, or of a slice of as many."""
        return self._num_blocks(numel) * sum(self.planes)

    def cut(self, numel: int, num_parts: int) -> list[slice]:
        """Parts of `range(numel)` in order, as equal as whole blocks allow; some are empty when blocks are few."""
        blocks = self._num_blocks(numel)
        edges = [min(numel, blocks * index // num_parts * self.block) for index in range(num_parts + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def gather(self, payload: memoryview, numel: int, part: slice) -> list[memoryview]:
        """The bytes of one part of the payload of `numel` elements, as views; empty planes are left out."""
        return [view for view in self._views(payload, numel, part) if view.nbytes]

    def scatter(self, source: bytes | bytearray | memoryview, payload: memoryview, numel: int, part: slice) -> None:
        """Write the bytes of one part, as `gather` gave them in a row, into the payload of `numel` elements."""
        view, position = memoryview(source).cast("B"), 0
        for target in self._views(payload, numel, part):
            target[:] = view[position : position + target.nbytes]
            position += target.nbytes
        assert position == view.nbytes

    def _views(self, payload: memoryview, numel: int, part: slice) -> Iterator[memoryview]:
        assert part.start % self.block == 0 or part.start == part.stop == numel
        num_blocks, offset = self._num_blocks(numel), 0
        first, end = self._num_blocks(part.start), self._num_blocks(part.stop)
        for num_bytes in self.planes:
            yield payload[offset + first * num_bytes : offset + end * num_bytes]
            offset += num_blocks * num_bytes

    def _num_blocks(self, numel: int) -> int:
        return -(-numel // self.block)
