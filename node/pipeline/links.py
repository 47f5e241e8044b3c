"""What the links from other stage peers to this one can carry, measured in use and by small probes.

Every peer measures what it receives: the goodput of the activations and gradients that come in, and, with one peer per heartbeat,
a probe: three empty round trips and, until enough is known of the link, as much as a microbatch's activations, or what half a
second carries: TCP begins slowly, and the goodput of less, or of more, says little of theirs. It publishes both in its signed
record, so both directions of every link are known, each from the end that can tell. Of several transfers at once each has a
part of the line, and nobody knows of how many the sender has; so what counts is the upper quartile of the latest measurements.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from protocol.errors import LlmNodeError, TransportError
from protocol.ids import PeerId
from protocol.records import MAX_LINKS, LinkNote
from protocol.transport import Stream, Transport
from protocol.wire import Message, read_bulk, read_message, write_bulk, write_message

__all__ = ["PROBE_PROTOCOL", "Links", "tail_of"]

PROBE_PROTOCOL = "/llm-node/probe/1"
LEAST_BYTES, MOST_BYTES = 32 << 10, 512 << 10
PROBED_S = 0.5
"""A probe carries as much as a payload, but no more than the link does in this time, and is within the bounds above."""
ENOUGH, FRESH_S = 4, 300.0
"""From so many transfers on, probes are empty while the latest one is no older than that."""
NUM_PINGS = 3
MAX_REQUESTS = NUM_PINGS + 1
TIMEOUT_S = 10.0
WINDOW = 16
MAX_BYTES_PER_S = 1e10
MAX_LATENCY_S = 60.0


class Probe(Message):
    """Asks for so many bytes."""

    num_bytes: Annotated[int, Field(ge=0, le=MOST_BYTES)]


class Echo(Message):
    """Comes before them."""


def tail_of(peer: PeerId) -> str:
    """The part of an id by which records name it where they name many."""
    return peer[-8:]


class _Link:
    """What is known of the link from one peer."""

    def __init__(self) -> None:
        self.round_trip_s: float | None = None
        self.bytes_per_s: deque[float] = deque(maxlen=WINDOW)
        self.probed_at_s = -float("inf")
        self.carried_at_s = -float("inf")

    def is_known(self, now_s: float) -> bool:
        """Whether a probe need not carry anything."""
        return len(self.bytes_per_s) >= ENOUGH and now_s - self.carried_at_s < FRESH_S

    @property
    def goodput(self) -> float:
        """Upper quartile, bytes per second; 0 if nothing was measured."""
        ordered = sorted(self.bytes_per_s)
        return ordered[3 * len(ordered) // 4] if ordered else 0.0


class Links:
    """The links to this peer; answers others' probes from now on.

    Args:
        payload_bytes: of a microbatch's activations.
    """

    def __init__(self, transport: Transport, *, payload_bytes: int) -> None:
        self._transport = transport
        self._probe_bytes = min(max(payload_bytes, LEAST_BYTES), MOST_BYTES)
        self._links: dict[PeerId, _Link] = {}
        transport.handle(PROBE_PROTOCOL, self.serve)

    def note_transfer(self, peer: PeerId, num_bytes: int, seconds: float) -> None:
        """`num_bytes` have come in, `seconds` after what was sent right before them."""
        link = self._links.get(peer)
        if link is not None and link.round_trip_s is not None:
            link.bytes_per_s.append(num_bytes / max(seconds, num_bytes / MAX_BYTES_PER_S))
            link.carried_at_s = asyncio.get_running_loop().time()

    def notes(self) -> list[LinkNote]:
        """What the record tells: those probed last, newest first."""
        known = sorted(self._links.items(), key=lambda item: -item[1].probed_at_s)
        return [
            LinkNote(
                peer=tail_of(peer),
                latency_s=min(link.round_trip_s / 2, MAX_LATENCY_S),
                bytes_per_s=link.goodput,
            )
            for peer, link in known
            if link.round_trip_s is not None
        ][:MAX_LINKS]

    async def probe_next(self, peers: Iterable[PeerId]) -> None:
        """Probe the one of these that was probed longest ago. Others are forgotten."""
        wanted = set(peers) - {self._transport.peer_id}
        self._links = {peer: link for peer, link in self._links.items() if peer in wanted}
        if not wanted:
            return
        links = {peer: self._links.setdefault(peer, _Link()) for peer in wanted}
        peer = min(sorted(links), key=lambda each: links[each].probed_at_s)
        links[peer].probed_at_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._probe(peer, links[peer])
        except (LlmNodeError, TimeoutError):
            pass  # the next one's turn; this one's comes again

    async def _probe(self, peer: PeerId, link: _Link) -> None:
        async with await self._transport.open(peer, PROBE_PROTOCOL) as stream:
            pings = [await self._ask(stream, 0) for _ in range(NUM_PINGS)]
            link.round_trip_s = min(pings)
            if link.is_known(asyncio.get_running_loop().time()):
                return
            num_bytes = round(min(self._probe_bytes, max(link.goodput * PROBED_S, LEAST_BYTES)))
            seconds = await self._ask(stream, num_bytes)
            # What is hardly longer than the round trip says only that the link is fast.
            self.note_transfer(peer, num_bytes, max(seconds - link.round_trip_s, 0.1 * seconds))

    async def _ask(self, stream: Stream, num_bytes: int) -> float:
        """Seconds until all is here."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        await write_message(stream, Probe(num_bytes=num_bytes))
        await read_message(stream, Echo)
        if num_bytes:
            await read_bulk(stream, num_bytes)
        return loop.time() - started_s

    async def serve(self, stream: Stream) -> None:
        """Answer one peer's probe."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                for _ in range(MAX_REQUESTS):
                    probe = await read_message(stream, Probe)
                    await write_message(stream, Echo())
                    if probe.num_bytes:
                        await write_bulk(stream, bytes(probe.num_bytes))
                        return
        except TimeoutError:
            raise TransportError("a probe was begun and not finished") from None
