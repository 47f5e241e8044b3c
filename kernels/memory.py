"""Large vectors in huge pages: a pass over 400 MB in pages of 4 KiB spends a third of its time on finding the pages."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

__all__ = ["in_huge_pages"]

_MIN_BYTES = 1 << 24
"""Below, there is little to gain."""


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Ask the system for huge pages under a tensor that nobody has written to yet. Does nothing where there are none.

    Args:
        fresh: of `torch.empty` or `torch.zeros`, whose memory the system gives when it is first written to. What has been
            written already stays where it is.

    Returns:
        The tensor itself.
    """
    num_bytes, advise = fresh.numel() * fresh.element_size(), _madvise()
    if num_bytes >= _MIN_BYTES and fresh.device.type == "cpu" and advise is not None:
        begin = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (fresh.data_ptr() + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(begin, end - begin, mmap.MADV_HUGEPAGE)
    return fresh


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
