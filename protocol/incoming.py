"""Incoming streams: which handler serves them, how many one peer may hold at once, and what happens when a handler fails.

Both transports share this, so a stranger meets the same limits on either. Every handler runs as a task owned here: it ends
with its stream closed, its exception logged and counted, and none is left when `close` returns.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from protocol.errors import ProtocolError, TransportError
from protocol.ids import PeerId
from protocol.transport import Handler, Stream
from protocol.violations import Violations

__all__ = ["MAX_STREAMS", "MAX_STREAMS_PER_PEER", "Incoming"]

logger = logging.getLogger(__name__)

MAX_STREAMS_PER_PEER = 32
MAX_STREAMS = 256


class Incoming:
    """Routes incoming streams to handlers and owns the tasks that serve them."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.num_refused = 0
        """Streams closed at once because their peer, or all peers together, held too many."""
        self.num_bugs = 0
        """Handlers ended by an exception that is neither a ProtocolError nor a TransportError."""
        self.violations = Violations()
        """ProtocolErrors of handlers."""
        self._open_streams: Counter[PeerId] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, protocol: str, stream: Stream) -> None:
        """Start serving `stream`; returns at once."""
        task = asyncio.get_running_loop().create_task(self._serve(protocol, stream), name=f"serve {protocol}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, protocol: str, stream: Stream) -> None:
        handler = self.handlers.get(protocol)
        crowded = self._open_streams[stream.peer] >= MAX_STREAMS_PER_PEER or len(self._tasks) > MAX_STREAMS
        if handler is None or crowded:
            self.num_refused += 1
            await stream.close()
            return
        self._open_streams[stream.peer] += 1
        try:
            async with stream:
                await handler(stream)
        except ProtocolError as error:
            offender = error.peer or stream.peer
            self.violations.blame(offender)
            logger.warning("peer %s broke the protocol %s: %s", offender, protocol, error.reason)
        except TransportError as error:
            logger.debug("stream %s from %s ended: %s", protocol, stream.peer, error)
        except Exception:  # a task root: a handler's bug must not take the transport down
            self.num_bugs += 1
            logger.exception("bug in the handler of %s", protocol)
        finally:
            self._open_streams[stream.peer] -= 1
            if not self._open_streams[stream.peer]:
                del self._open_streams[stream.peer]

    def cancel(self) -> None:
        """Cancel every handler, without waiting."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Cancel every handler and wait until all have ended."""
        while self._tasks:
            self.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
