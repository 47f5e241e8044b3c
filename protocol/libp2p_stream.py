"""One libp2p stream, which reaches us through a Unix socket of p2pd.

Bulk data goes from the socket straight to where it is wanted: `DirectReader.read_into` has asyncio hand every piece over as it
comes in. The plain way (`readexactly`, then append) copies each byte three times more and takes five times the processor
time: 2.3–3.5 s per GiB against 0.6–0.8 s, measured on both loops. A reader of our own below asyncio's streams
(`BufferedProtocol`) would save another 0.2 s per GiB, and would have to do all that asyncio's streams do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import SupportsIndex

from protocol.errors import StreamClosedError
from protocol.ids import PeerId
from protocol.transport import Stream, Traffic

__all__ = ["READ_BUFFER_BYTES", "DirectReader", "Libp2pStream"]

READ_BUFFER_BYTES = 1 << 18
_LINGER_S = 2.0
"""How long a closed stream may go on handing its last bytes to p2pd before it is cut off."""


class DirectReader(asyncio.StreamReader):
    """asyncio's stream reader, with one more way to read: into a buffer of the caller's."""

    def __init__(self) -> None:
        super().__init__(limit=READ_BUFFER_BYTES)
        self._num_held = 0
        """Bytes that came in while nobody read into a buffer."""
        self._target = memoryview(b"")
        """What is left of the buffer being read into."""
        self._filled: asyncio.Future[None] | None = None

    async def readexactly(self, n: int) -> bytes:
        data = await super().readexactly(n)
        self._num_held -= n
        return data

    async def read_into(self, out: memoryview) -> None:
        """Fill `out`. A cancelled call leaves `out` partly filled and the stream unusable.

        Raises:
            IncompleteReadError: the stream ended first (`partial` is empty).
            OSError: the stream broke.
        """
        num_held = min(self._num_held, out.nbytes)
        out[:num_held] = await self.readexactly(num_held)
        self._target = out[num_held:]
        if not self._target:
            return
        self._raise_if_over()
        self._filled = asyncio.get_running_loop().create_future()
        try:
            await self._filled
            if self._target:
                self._raise_if_over()
        finally:
            self._target, self._filled = memoryview(b""), None

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        """asyncio's call: `data` has come in."""
        assert isinstance(data, bytes)
        target = self._target
        num_direct = min(len(data), len(target))
        if num_direct:
            target[:num_direct] = memoryview(data)[:num_direct]
            self._target = target[num_direct:]
            if not self._target:
                self._wake()
            if num_direct == len(data):
                return
            data = data[num_direct:]
        self._num_held += len(data)
        super().feed_data(data)

    def feed_eof(self) -> None:
        """asyncio's call: the other side will send no more."""
        super().feed_eof()
        self._wake()

    def set_exception(self, exc: Exception) -> None:
        """asyncio's call: the connection broke."""
        super().set_exception(exc)
        self._wake()

    def _wake(self) -> None:
        if self._filled is not None and not self._filled.done():
            self._filled.set_result(None)

    def _raise_if_over(self) -> None:
        if (error := self.exception()) is not None:
            raise error
        if self.at_eof():
            raise asyncio.IncompleteReadError(b"", len(self._target))


class Libp2pStream(Stream):
    """A stream over an open socket pair of asyncio; see `Stream`."""

    def __init__(
        self, *, peer: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, traffic: Traffic
    ) -> None:
        assert isinstance(reader, DirectReader)
        self.peer = peer
        self._reader = reader
        self._writer = writer
        self._traffic = traffic
        self._closed = False

    async def read_exactly(self, num_bytes: int) -> bytes:
        if self._closed:
            raise StreamClosedError("the stream is closed")
        try:
            data = await self._reader.readexactly(num_bytes)
        except asyncio.IncompleteReadError as error:
            missing = num_bytes - len(error.partial)
            raise StreamClosedError(f"the stream ended {missing} of {num_bytes} bytes early") from None
        except OSError as error:
            raise StreamClosedError(f"the stream broke: {error}") from None
        self._traffic.received_bytes += num_bytes
        return data

    async def read_into(self, out: memoryview) -> None:
        if self._closed:
            raise StreamClosedError("the stream is closed")
        try:
            await self._reader.read_into(out)
        except asyncio.IncompleteReadError as error:
            raise StreamClosedError(f"the stream ended {error.expected} of {out.nbytes} bytes early") from None
        except OSError as error:
            raise StreamClosedError(f"the stream broke: {error}") from None
        self._traffic.received_bytes += out.nbytes

    async def write(self, data: bytes | memoryview) -> None:
        if self._closed or self._reader.at_eof() or self._writer.is_closing():
            raise StreamClosedError("the stream is closed")
        try:
            self._writer.write(data)
            await self._writer.drain()
        except (OSError, RuntimeError) as error:  # uvloop: RuntimeError when the transport closed meanwhile
            raise StreamClosedError(f"the stream broke: {error}") from None
        self._traffic.sent_bytes += len(data) if isinstance(data, bytes) else data.nbytes

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._writer.close()
        try:
            async with asyncio.timeout(_LINGER_S):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            pass
        finally:
            self._writer.transport.abort()
