"""The real network: libp2p streams and a DHT, through hivemind's go-libp2p daemon (p2pd).

One `Libp2pTransport` owns one p2pd process. Streams are raw libp2p streams under exactly the protocol name given, so any
libp2p implementation can open them. Peers are found through the addresses they sign in their records, through the
invitations we were started with, and through libp2p's own routing. While running, it keeps itself connected: it goes back to
the peers it knows when p2pd had to be restarted, when its routing table has run empty, or when a partition has healed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from protocol.dht_rules import Validator
from protocol.errors import DeadlineError, PeerUnreachableError, TransportError, UserError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.incoming import Incoming
from protocol.libp2p_addresses import split_address
from protocol.libp2p_daemon import Daemon
from protocol.libp2p_dht import Libp2pDht
from protocol.libp2p_process import DaemonConfig
from protocol.libp2p_stream import Libp2pStream
from protocol.transport import Handler, Stream, Traffic, Transport

__all__ = ["Libp2pTransport"]

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 15.0
_JOIN_TIMEOUT_S = 5.0
_UPKEEP_INTERVAL_S = 5.0
_LONELY_UPKEEP_INTERVAL_S = 1.0
_NUM_RECONNECTS = 4
"""How many known peers are tried per upkeep."""
_MAX_KNOWN_PEERS = 4096
_MAX_ADDRESSES_PER_PEER = 8


class Libp2pTransport(Transport):
    """A peer of the real network.

    Args:
        identity: who we are; its key file is given to p2pd.
        listen: TCP multiaddresses to listen on; port 0 lets the machine choose.
        announce: addresses to tell others instead of the machine's own, for port forwarding.
        initial_peers: full multiaddresses of peers to join through; they need not be up.
        runtime_dir: private directory for sockets, of this node alone.
        validator: checks DHT records.
        relay_service: relay for peers behind NATs; for publicly reachable machines.

    Raises:
        UserError: an address is malformed.
    """

    dht: Libp2pDht

    def __init__(
        self,
        *,
        identity: Identity,
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        announce: Sequence[str] = (),
        initial_peers: Sequence[str] = (),
        runtime_dir: Path,
        validator: Validator | None,
        relay_service: bool = False,
    ) -> None:
        if identity.path is None:
            raise UserError("the real network needs an identity kept in a file; create one with `llm-node identity`")
        self.peer_id = identity.peer_id
        self.traffic = Traffic()
        self.incoming = Incoming()
        self._known: OrderedDict[PeerId, list[str]] = OrderedDict()
        self._invited: dict[PeerId, list[str]] = {}
        for address in initial_peers:
            path, peer = split_address(address)
            if peer != self.peer_id:
                self._invited.setdefault(peer, []).append(path)
        config = DaemonConfig(
            identity_path=identity.path,
            runtime_dir=runtime_dir,
            listen=listen,
            announce=announce,
            relays=[] if relay_service else list(initial_peers),
            relay_service=relay_service,
        )
        self.daemon = Daemon(config, on_stream=self._on_stream, on_respawn=self._reconnect)
        self.dht = Libp2pDht(self.daemon, validator)
        self._tasks: set[asyncio.Task[None]] = set()
        self._registrations: set[asyncio.Task[None]] = set()
        self._running = False

    # ---- Transport ----

    async def addresses(self) -> list[str]:
        await self._ready()
        return await self.daemon.host_addresses()

    def handle(self, protocol: str, handler: Handler) -> None:
        self.incoming.handlers[protocol] = handler
        if self._running:
            self._spawn(self.daemon.serve(protocol), self._registrations)

    def unhandle(self, protocol: str) -> None:
        self.incoming.handlers.pop(protocol, None)  # p2pd goes on passing streams to us, which are closed at once

    async def connect(self, address: str) -> PeerId:
        path, peer = split_address(address)
        if peer == self.peer_id:
            raise PeerUnreachableError("that address is our own")
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await self._ready()
                await self.daemon.connect(peer, [path], timeout_s=_CONNECT_TIMEOUT_S)
        except TimeoutError:
            raise PeerUnreachableError(f"{peer} does not answer at {path}") from None
        await self.learn(peer, [address])
        await self.dht.join([peer])
        return peer

    async def open(self, peer: PeerId, protocol: str, *, timeout_s: float = 10.0) -> Stream:
        if peer == self.peer_id:
            raise PeerUnreachableError("a peer can not open a stream to itself")
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready()
                if peer in self._known:
                    await self._try_connect(peer, timeout_s)
                reader, writer = await self.daemon.open_stream(peer, protocol, timeout_s=timeout_s)
        except TimeoutError:
            raise DeadlineError(f"no stream to {peer} within {timeout_s:g} s") from None
        return Libp2pStream(peer=peer, reader=reader, writer=writer, traffic=self.traffic)

    async def learn(self, peer: PeerId, addresses: list[str]) -> None:
        paths = []
        for address in addresses[:_MAX_ADDRESSES_PER_PEER]:
            try:
                path, named = split_address(address)
            except UserError:
                continue
            if named == peer != self.peer_id:
                paths.append(path)
        if paths:
            self._known.pop(peer, None)
            self._known[peer] = paths
            if len(self._known) > _MAX_KNOWN_PEERS:
                self._known.popitem(last=False)

    async def __aenter__(self) -> Self:
        try:
            await self.daemon.start()
            for protocol in self.incoming.handlers:
                await self.daemon.serve(protocol)
            self._running = True
            await self.dht.start()
            if self._invited:
                await self._reconnect()
        except BaseException:
            await self._close()
            raise
        self._spawn(self._upkeep(), self._tasks)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._close()

    # ---- inside ----

    def _spawn(self, coro: Coroutine[Any, Any, None], owner: set[asyncio.Task[None]]) -> None:
        task = asyncio.get_running_loop().create_task(coro)
        owner.add(task)
        task.add_done_callback(owner.discard)

    async def _close(self) -> None:
        self._running = False
        tasks = [*self._tasks, *self._registrations]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.incoming.close()
        await self.daemon.shutdown()
        for _ in range(10):  # hivemind's own tasks have all failed by now; let them notice
            await asyncio.sleep(0)

    async def _ready(self) -> None:
        if self._registrations:
            await asyncio.wait(self._registrations)
        await self.daemon.ready.wait()

    def _on_stream(
        self, peer: PeerId, protocol: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        stream = Libp2pStream(peer=peer, reader=reader, writer=writer, traffic=self.traffic)
        self.incoming.accept(protocol, stream)

    async def _try_connect(self, peer: PeerId, timeout_s: float) -> bool:
        addresses = self._known.get(peer) or self._invited[peer]
        try:
            await self.daemon.connect(peer, addresses, timeout_s=timeout_s)
        except PeerUnreachableError as error:
            logger.debug("%s", error)
            return False
        return True

    async def _reconnect(self) -> None:
        """Dial peers that we know but that our routing table does not hold, and join the DHT through them."""
        for peer in list(islice(self._known, _NUM_RECONNECTS)):
            self._known.move_to_end(peer)  # others have their turn next time
        candidates = [*self._invited, *islice(reversed(self._known), _NUM_RECONNECTS)]
        missing = [peer for peer in dict.fromkeys(candidates) if not self.dht.knows(peer)]
        try:
            async with asyncio.timeout(_JOIN_TIMEOUT_S):
                reached = await asyncio.gather(*(self._try_connect(peer, _JOIN_TIMEOUT_S) for peer in missing))
                await self.dht.join([peer for peer, connected in zip(missing, reached, strict=True) if connected])
        except TimeoutError:
            logger.debug("joining the network through known peers took too long")

    async def _upkeep(self) -> None:
        while True:
            await asyncio.sleep(_UPKEEP_INTERVAL_S if self.dht.num_neighbours else _LONELY_UPKEEP_INTERVAL_S)
            self.daemon.forget_ended_calls()
            self.dht.tidy()
            if self.daemon.ready.is_set():
                try:
                    await self._reconnect()
                except TransportError as error:
                    logger.debug("%s", error)
