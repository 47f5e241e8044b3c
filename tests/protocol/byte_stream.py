"""A stream made of bytes, and how the tests of the wire format call what may refuse them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import settings

from protocol.errors import ProtocolError, StreamClosedError
from protocol.transport import Stream
from tests.protocol.samples import identity

__all__ = ["A", "B", "ByteStream", "T", "attempt", "fuzz"]

T = TypeVar("T")
fuzz = settings(max_examples=200, deadline=None, derandomize=True, database=None)
A, B = identity(1).peer_id, identity(2).peer_id


class ByteStream(Stream):
    """A stream whose other end has already sent everything and gone; what is written is kept."""

    def __init__(self, data: bytes = b"") -> None:
        self.peer = B
        self.data = data
        self.written = b""
        self.largest_read_bytes = 0

    async def read_exactly(self, num_bytes: int) -> bytes:
        self.largest_read_bytes = max(self.largest_read_bytes, num_bytes)
        if num_bytes > len(self.data):
            raise StreamClosedError("the stream ended")
        head, self.data = self.data[:num_bytes], self.data[num_bytes:]
        return head

    async def write(self, data: bytes | memoryview) -> None:
        self.written += bytes(data)

    async def close(self) -> None:
        pass


def attempt(action: Callable[[], T]) -> T | ProtocolError:
    """What `action` returns or, if that is how it ends, its ProtocolError."""
    try:
        return action()
    except ProtocolError as error:
        return error
