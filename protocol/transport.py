"""What the network looks like to everything above it: streams between peers, and a shared table of small records.

There are exactly two implementations, `protocol.libp2p` (real) and `protocol.memory` (in-process, virtual time), and both
pass one conformance suite (tests/protocol/test_transport_conformance*.py). A stream is named `/llm-node/<what>/1`, is
full-duplex and ordered, and its remote end is authenticated: `stream.peer` is the holder of that Ed25519 key.

Every coroutine here may be cancelled at any await: a cancelled read or write leaves the stream unusable, so close it.
Deadlines belong to the caller (`asyncio.timeout`); the only timeout kept in here is the one for opening a stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from protocol.ids import PeerId

__all__ = ["Dht", "DhtEntry", "Handler", "Stream", "Traffic", "Transport"]


class Stream(ABC):
    """One ordered, reliable, authenticated byte stream to a peer. An async context manager: leaving it closes both ways."""

    peer: PeerId

    @abstractmethod
    async def read_exactly(self, num_bytes: int) -> bytes:
        """Read exactly `num_bytes`. The caller has checked `num_bytes` against a limit before.

        Raises:
            StreamClosedError: the stream ended first.
        """

    async def read_into(self, out: memoryview) -> None:
        """Fill `out` (flat, of single bytes): what bulk data is read with, since it spares copies where the transport can.

        Cancelled or failed, it leaves `out` partly filled.

        Raises:
            StreamClosedError: the stream ended first.
        """
        out[:] = await self.read_exactly(out.nbytes)

    @abstractmethod
    async def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`, waiting while the other side is slower (back-pressure).

        Raises:
            StreamClosedError: the stream is gone.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close both directions; idempotent, never raises. Bytes already written are delivered if the peer is alive."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


Handler = Callable[[Stream], Awaitable[None]]
"""Serves one incoming stream; the transport closes the stream when it returns. A ProtocolError or TransportError it raises
is logged and counted against the peer; anything else is logged as a bug. It never takes the transport down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtEntry:
    """One live record under a DHT key."""

    subkey: str
    value: bytes
    expires_at_s: float
    """Unix time."""


class Dht(ABC):
    """A distributed table of small signed records: key → {subkey: value}.

    Values are checked by the validator given at construction, both when stored here by others and when read from others.
    """

    @abstractmethod
    async def store(self, key: str, subkey: str, value: bytes, *, ttl_s: float) -> bool:
        """Publish a record for `ttl_s` seconds (a later store under the same subkey replaces it). True if any node took it."""

    @abstractmethod
    async def get(self, key: str) -> list[DhtEntry]:
        """All live, valid records under `key` that the nearest reachable nodes hold; never a cached stale copy."""


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Payload bytes of our streams since the start (encryption and DHT chatter not counted)."""

    sent_bytes: int = 0
    received_bytes: int = 0


class Transport(ABC):
    """A peer's network. An async context manager: entering starts it, leaving ends every stream and child process."""

    peer_id: PeerId
    dht: Dht
    traffic: Traffic

    @abstractmethod
    async def addresses(self) -> list[str]:
        """Multiaddresses ending in `/p2p/<peer id>` under which others can dial us; no unspecified address, and loopback
        only if we listen on nothing else."""

    @abstractmethod
    def handle(self, protocol: str, handler: Handler) -> None:
        """Serve incoming streams named `protocol`. May be called before or after the transport started."""

    @abstractmethod
    def unhandle(self, protocol: str) -> None:
        """Serve them no more: who opens one fails, or finds it ended. Handlers at work go on. Harmless without a handler."""

    @abstractmethod
    async def connect(self, address: str) -> PeerId:
        """Dial a multiaddress ending in `/p2p/<peer id>`, so that `open` with that id works; returns the id.

        Raises:
            UserError: the address is malformed.
            PeerUnreachableError: nobody answers there, or somebody else does.
        """

    @abstractmethod
    async def open(self, peer: PeerId, protocol: str, *, timeout_s: float = 10.0) -> Stream:
        """Open a stream to `peer`, found through existing connections, known addresses or the DHT's routing.

        Raises:
            PeerUnreachableError: not reachable, or it does not speak `protocol`.
            DeadlineError: not open within `timeout_s`.
        """

    @abstractmethod
    async def learn(self, peer: PeerId, addresses: list[str]) -> None:
        """Remember dialable addresses of a peer (from its signed record). Cheap: it does not dial, never raises for bad input."""

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...
