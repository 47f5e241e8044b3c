"""One stream of the in-process network: two pipes with latency, bandwidth, back-pressure, loss and partitions.

A pipe is a queue of chunks with arrival times. What was written waits in `_in_flight` until it arrives, then in `_arrived`
until it is read; both together never exceed WINDOW_BYTES, or the writer waits. Chunks of all streams of one direction of
a link share its bandwidth, first come first served. What is `Hollow` takes its time like everything else, and is never copied.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from protocol.errors import StreamClosedError
from protocol.ids import PeerId
from protocol.transport import Stream, Traffic

__all__ = ["Hollow", "LinkSpec", "MemoryStream", "Pipe", "Wire"]

WINDOW_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 18


class Hollow(bytes):
    """Bytes of which only the number matters: simulated payloads. Whoever reads them by `read_into` finds nothing written there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """What the path between two peers is like, in each direction."""

    latency_s: float = 0.0
    """One way."""
    bytes_per_s: float = math.inf
    loss: float = 0.0
    """Probability, per write, that the stream is reset."""


class Wire:
    """One direction of a link: the sender's queue for its bandwidth."""

    def __init__(self, spec: LinkSpec) -> None:
        self.spec = spec
        self._free_at_s = 0.0

    def arrival_s(self, num_bytes: int, now_s: float) -> float:
        """Loop time at which `num_bytes` handed over now will have arrived."""
        self._free_at_s = max(now_s, self._free_at_s) + num_bytes / self.spec.bytes_per_s
        return self._free_at_s + self.spec.latency_s


class Pipe:
    """One direction of one stream."""

    def __init__(self, wire: Wire, *, blocked: Callable[[], bool]) -> None:
        self._wire = wire
        self._blocked = blocked
        self._in_flight: deque[tuple[float, bytes | memoryview | None]] = deque()  # None marks the end of the stream
        self._arrived: deque[memoryview] = deque()
        self._held_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self.ended = False  # the end has arrived, or the reader went away, or the pipe was reset
        self._finished = False  # the writer has closed its side

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def put(self, data: memoryview) -> None:
        for start in range(0, len(data), _CHUNK_BYTES):
            piece = data[start : start + _CHUNK_BYTES]
            chunk = piece if isinstance(piece.obj, Hollow) else bytes(piece)
            while self._held_bytes + len(chunk) > WINDOW_BYTES and not self.ended:
                await self._changed.wait()
            if self.ended or self._finished:
                raise StreamClosedError("the stream is closed")
            self._held_bytes += len(chunk)
            self._send(chunk)

    def finish(self) -> None:
        """Close the writing side: the end arrives after everything written before."""
        if not self._finished:
            self._finished = True
            if not self.ended:
                self._send(None)

    def abandon(self) -> None:
        """Reset: nothing more arrives, what has not been read is lost, whoever waits is woken with an error."""
        self.ended = True
        self._in_flight.clear()
        self._arrived.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    def _send(self, chunk: bytes | memoryview | None) -> None:
        now_s = asyncio.get_running_loop().time()
        self._in_flight.append((self._wire.arrival_s(len(chunk or b""), now_s), chunk))
        self.pump()

    def pump(self) -> None:
        """Deliver what is due, and set the timer for the next chunk; nothing moves while the path is blocked."""
        loop = asyncio.get_running_loop()
        if self._timer is not None or self._blocked():
            return
        while self._in_flight and self._in_flight[0][0] <= loop.time():
            self._deliver()
        if self._in_flight:
            self._timer = loop.call_at(self._in_flight[0][0], self._due)

    def _due(self) -> None:
        self._timer = None
        if not self._blocked():
            self._deliver()  # without asking the clock: rounding may fire a timer a hair early
            self.pump()

    def _deliver(self) -> None:
        _, chunk = self._in_flight.popleft()
        if chunk is None:
            self.ended = True
        else:
            self._arrived.append(memoryview(chunk))
        self._wake()

    async def pieces(self, num_bytes: int) -> AsyncIterator[memoryview]:
        """The next `num_bytes`, as they arrive."""
        missing = num_bytes
        while missing:
            while not self._arrived:
                if self.ended:
                    raise StreamClosedError(f"the stream ended {missing} of {num_bytes} bytes early")
                await self._changed.wait()
            head = self._arrived.popleft()
            if len(head) > missing:
                self._arrived.appendleft(head[missing:])
                head = head[:missing]
            missing -= len(head)
            self._held_bytes -= len(head)
            self._wake()
            yield head


class MemoryStream(Stream):
    """One end of a stream of the in-process network.

    Args:
        peer: the other end.
        outgoing: pipe to the other end.
        incoming: pipe from the other end.
        traffic: this end's byte counters.
        breaks: called once per write; true if the stream is to be reset now.
    """

    def __init__(
        self, *, peer: PeerId, outgoing: Pipe, incoming: Pipe, traffic: Traffic, breaks: Callable[[], bool]
    ) -> None:
        self.peer = peer
        self._outgoing = outgoing
        self._incoming = incoming
        self._traffic = traffic
        self._breaks = breaks
        self._closed = False

    async def read_exactly(self, num_bytes: int) -> bytes:
        if self._closed:
            raise StreamClosedError("the stream is closed")
        data = b"".join([piece async for piece in self._incoming.pieces(num_bytes)])
        self._traffic.received_bytes += num_bytes
        return data

    async def read_into(self, out: memoryview) -> None:
        if self._closed:
            raise StreamClosedError("the stream is closed")
        filled = 0
        async for piece in self._incoming.pieces(out.nbytes):
            if not isinstance(piece.obj, Hollow):
                out[filled : filled + len(piece)] = piece
            filled += len(piece)
        self._traffic.received_bytes += out.nbytes

    async def write(self, data: bytes | memoryview) -> None:
        if self._breaks():
            self.reset()
        if self._closed or self._incoming.ended:
            raise StreamClosedError("the stream is closed")
        view = memoryview(data).cast("B")
        await self._outgoing.put(view)
        self._traffic.sent_bytes += len(view)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._outgoing.finish()
            self._incoming.abandon()

    @property
    def is_over(self) -> bool:
        """Whether nothing can happen on this end any more."""
        return self._closed or (self._incoming.ended and self._outgoing.ended)

    def reset(self) -> None:
        """Break both directions at once, as a crash of either end does."""
        self._outgoing.abandon()
        self._incoming.abandon()

    def pump(self) -> None:
        """Let both directions flow again after a partition."""
        self._outgoing.pump()
        self._incoming.pump()
