"""Memory for what partners send, taken over and over."""

from __future__ import annotations

import sys
from typing import Any

from protocol.wire import bulk_buffer

__all__ = ["SideBuffer"]

_REFERENCES_OF_A_FREE_BUFFER = 2
"""The attribute and `getrefcount`'s own argument; any number of views add one more."""


class SideBuffer:
    """Memory for the payload of one partner after the other. Fresh memory would have to be cleared by the kernel each time, which
    took a sixth of an exchange's time in this process."""

    def __init__(self) -> None:
        self._memory: Any = b""

    def take(self, num_bytes: int) -> memoryview:
        """A buffer that nobody else looks at: the last one if no view of it is left, else a new one."""
        is_free = sys.getrefcount(self._memory) == _REFERENCES_OF_A_FREE_BUFFER
        if not is_free or len(self._memory) < num_bytes:
            self._memory = bulk_buffer(num_bytes).obj
        return memoryview(self._memory)[:num_bytes]
