"""One libp2p stream, which reaches us through a Unix socket of p2pd."""

from __future__ import annotations

import asyncio

from protocol.errors import StreamClosedError
from protocol.ids import PeerId
from protocol.transport import Stream, Traffic

__all__ = ["READ_BUFFER_BYTES", "Libp2pStream"]

READ_BUFFER_BYTES = 1 << 18
_LINGER_S = 2.0
"""How long a closed stream may go on handing its last bytes to p2pd before it is cut off."""


class Libp2pStream(Stream):
    """A stream over an open socket pair of asyncio; see `Stream`."""

    def __init__(
        self, *, peer: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, traffic: Traffic
    ) -> None:
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
