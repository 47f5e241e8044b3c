"""Talking to p2pd, the go-libp2p daemon that does our networking, over its control socket.

hivemind's `P2P` class speaks the daemon's protocol, and its DHT wants a `P2P` to talk through; so this is a subclass that
replaces what does not fit a volunteer's machine:

- p2pd lives in a private directory, dies with us, and if it dies first it is back within two seconds with the same
  identity, port and handlers.
- Every control request closes its socket on every path, and calls in flight fail at once when p2pd dies; hivemind leaks
  the former and leaves the latter hanging.
- Every DHT call, in or out, passes the guards of libp2p_guard.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

from protocol.errors import PeerUnreachableError, UserError
from protocol.ids import PeerId
from protocol.libp2p_addresses import dialable, with_known_port
from protocol.libp2p_guard import CallGuard, check_response
from protocol.libp2p_hivemind import (
    P2P,
    ControlClient,
    DaemonConnector,
    Multiaddr,
    MultiaddrError,
    P2PDaemonError,
    PeerID,
    p2pd_pb2,
    read_pbmsg_safe,
    write_pbmsg,
)
from protocol.libp2p_process import MAX_MESSAGE_BYTES, DaemonConfig, DaemonProcess
from protocol.libp2p_stream import DirectReader

__all__ = ["Daemon", "StreamCallback"]

logger = logging.getLogger(__name__)

_RESPAWN_DELAY_S = 0.2
_HEADER_TIMEOUT_S = 5.0
_CONTROL_ERRORS = (OSError, asyncio.IncompleteReadError, P2PDaemonError)

Request = p2pd_pb2.Request
StreamCallback = Callable[[PeerId, str, asyncio.StreamReader, asyncio.StreamWriter], None]
"""(peer, protocol, reader, writer) of an incoming stream; takes the socket over."""


class _PendingCalls(dict[UUID, "asyncio.Future[Any]"]):
    """hivemind sets results without looking whether the caller still waits; a timeout at the wrong moment would end its
    reader. To it, a call that nobody waits for shall not be pending."""

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)  # type: ignore[call-overload]
        return future is not None and not future.done()


class Daemon(P2P):  # type: ignore[misc]  # hivemind is untyped
    """A running p2pd and the way to talk to it.

    Args:
        config: how to start it.
        on_stream: called for every incoming stream of a protocol given to `serve`.
        on_respawn: awaited each time p2pd is back after having died.
    """

    def __init__(
        self,
        config: DaemonConfig,
        *,
        on_stream: StreamCallback,
        on_respawn: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        super().__init__()
        self.ready = asyncio.Event()
        """Set while p2pd serves."""
        self.num_respawns = 0
        self._process = DaemonProcess(config)
        self._on_stream = on_stream
        self._on_respawn = on_respawn
        self._connector = DaemonConnector(control_maddr=Multiaddr(f"/unix{self._process.control_socket}"))
        self._stream_address = Multiaddr(f"/unix{self._process.stream_socket}")
        self._protocols: list[str] = []
        self._unary: dict[str, tuple[Callable[..., Awaitable[Any]], Any]] = {}
        self._addresses: list[str] = []
        self._guard = CallGuard()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._accepted: list[asyncio.StreamWriter] = []
        """Incoming streams that were open at the last look: a task that is cancelled before its first step closes nothing."""

    def __del__(self) -> None:
        """Nothing: `shutdown` ends everything, and p2pd does not outlive us anyway."""

    # ---- life and death ----

    async def start(self) -> None:
        """Start p2pd and its supervisor.

        Raises:
            UserError: a port or the directory is taken, an address is wrong, or p2pd does not start.
        """
        self._process.claim_directory()
        try:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(
                lambda: asyncio.StreamReaderProtocol(DirectReader(), self._accept), self._process.stream_socket
            )
            await self._begin()
            await self.host_addresses()
            listen = self._process.listen
            self._process.listen = [with_known_port(address, self._addresses) for address in listen]
        except _CONTROL_ERRORS as error:
            await self.shutdown()
            raise UserError(f"p2pd does not answer ({_short(error)}); start again") from None
        except BaseException:
            await self.shutdown()
            raise
        self._spawn(self._supervise())

    async def shutdown(self) -> None:
        """End p2pd, every task and every socket; idempotent."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end()
        server, self._server = self._server, None
        if server is not None:
            server.close()
            await server.wait_closed()
        for writer in self._accepted:
            writer.transport.abort()
        self._accepted = []
        self._process.release_directory()

    def _spawn(self, coro: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin(self) -> None:
        await self._process.start()
        control = await ControlClient.create(
            self._connector, self._stream_address, persistent_conn_max_msg_size=MAX_MESSAGE_BYTES
        )
        control._pending_calls = _PendingCalls()
        self._client = control
        self.peer_id = PeerID((await self._ask(Request(type=Request.IDENTIFY))).identify.id)
        for name, (handler, input_type) in self._unary.items():
            await super()._add_protobuf_unary_handler(name, handler, input_type)
        for protocol in self._protocols:
            await self._register(protocol)
        self._alive = True
        self.ready.set()

    async def _end(self) -> None:
        self.ready.clear()
        await self._process.stop()
        control, self._client, self._alive = self._client, None, False
        if control is not None:
            for future in control._pending_calls.values():
                if not future.done():
                    future.set_exception(P2PDaemonError("p2pd ended"))
            tasks = [control._read_task, control._write_task, *control._handler_tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _supervise(self) -> None:
        while True:
            died = asyncio.ensure_future(self._process.wait())
            try:
                await asyncio.wait((died, self._client._read_task), return_when=asyncio.FIRST_COMPLETED)
            finally:
                died.cancel()
            logger.warning("p2pd ended unexpectedly; starting it again")
            await self._end()
            while not self.ready.is_set():
                try:
                    await self._begin()
                except (UserError, *_CONTROL_ERRORS) as error:
                    logger.error("p2pd does not come back: %s", error)
                    await self._end()
                    await asyncio.sleep(_RESPAWN_DELAY_S)
            self.num_respawns += 1
            self._spawn(self._on_respawn())

    def forget_ended_calls(self) -> None:
        """Drop what hivemind remembers of incoming calls that their callers cancelled; it never does so itself."""
        if self._client is not None:
            tasks = self._client._handler_tasks
            for call_id in [call_id for call_id, task in tasks.items() if task.done()]:
                del tasks[call_id]

    # ---- control requests ----

    @asynccontextmanager
    async def _control(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A new connection to p2pd, cut off if the block fails, left open if it succeeds."""
        loop, reader = asyncio.get_running_loop(), DirectReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.create_unix_connection(lambda: protocol, str(self._process.control_socket))
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            yield reader, writer
        except BaseException:
            writer.transport.abort()
            raise

    async def _ask(self, request: Any) -> Any:
        async with self._control() as (reader, writer):
            response = await _exchange(request, reader, writer)
            writer.transport.abort()
            return response

    async def connect(self, peer: PeerId, addresses: list[str], *, timeout_s: float) -> None:
        """Connect to a peer at one of `addresses`; returns at once when connected already.

        Raises:
            PeerUnreachableError: it did not work, for whatever reason.
        """
        try:
            connect = p2pd_pb2.ConnectRequest(
                peer=PeerID.from_base58(peer).to_bytes(),
                addrs=[Multiaddr(address).to_bytes() for address in addresses],
                timeout=max(1, round(timeout_s)),
            )
            await self._ask(Request(type=Request.CONNECT, connect=connect))
        except (ValueError, MultiaddrError, *_CONTROL_ERRORS) as error:
            raise PeerUnreachableError(f"{peer} is not reachable: {_short(error)}") from None

    async def open_stream(
        self, peer: PeerId, protocol: str, *, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream to a peer that p2pd is connected to, or finds.

        Raises:
            PeerUnreachableError: it did not work, for whatever reason.
        """
        try:
            stream_open = p2pd_pb2.StreamOpenRequest(
                peer=PeerID.from_base58(peer).to_bytes(), proto=[protocol], timeout=max(1, round(timeout_s))
            )
            async with self._control() as (reader, writer):
                await _exchange(Request(type=Request.STREAM_OPEN, streamOpen=stream_open), reader, writer)
                return reader, writer
        except (ValueError, *_CONTROL_ERRORS) as error:
            raise PeerUnreachableError(f"{peer} is not reachable for {protocol}: {_short(error)}") from None

    async def host_addresses(self) -> list[str]:
        """Dialable multiaddresses of this host; the last known ones if p2pd dies meanwhile."""
        with suppress(*_CONTROL_ERRORS):
            identify = (await self._ask(Request(type=Request.IDENTIFY))).identify
            self._addresses = [str(Multiaddr(raw)) for raw in identify.addrs]
        return dialable(self._addresses, PeerId(self.peer_id.to_base58()))

    # ---- incoming streams ----

    async def serve(self, protocol: str) -> None:
        """Have p2pd hand us the streams named `protocol`, now and after every respawn."""
        if protocol not in self._protocols:
            self._protocols.append(protocol)
            with suppress(*_CONTROL_ERRORS):  # p2pd just died: its successor gets them all
                await self._register(protocol)

    async def _register(self, protocol: str) -> None:
        address = self._stream_address.to_bytes()
        handler = p2pd_pb2.StreamHandlerRequest(addr=address, proto=[protocol], balanced=False)
        await self._ask(Request(type=Request.STREAM_HANDLER, streamHandler=handler))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # it came in while we were closing
            writer.transport.abort()
            return
        self._accepted = [other for other in self._accepted if not other.is_closing()] + [writer]
        self._spawn(self._introduce(reader, writer))

    async def _introduce(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read p2pd's word on who opened the stream, then hand the stream over."""
        info = p2pd_pb2.StreamInfo()
        try:
            async with asyncio.timeout(_HEADER_TIMEOUT_S):
                await read_pbmsg_safe(reader, info)
            self._on_stream(PeerId(PeerID(info.peer).to_base58()), info.proto, reader, writer)
        except (TimeoutError, *_CONTROL_ERRORS):
            writer.transport.abort()
        except BaseException:
            writer.transport.abort()
            raise

    # ---- what hivemind's DHT calls ----

    async def _add_protobuf_unary_handler(
        self, handle_name: str, handler: Callable[..., Awaitable[Any]], input_protobuf_type: Any, balanced: bool = False
    ) -> None:
        guarded = self._guard.wrap(handler)
        self._unary[handle_name] = guarded, input_protobuf_type
        await super()._add_protobuf_unary_handler(handle_name, guarded, input_protobuf_type, balanced)

    async def _call_unary_protobuf_handler(
        self, peer_id: PeerID, handle_name: str, input: Any, output_protobuf_type: Any
    ) -> Any:
        if self._client is None:
            raise P2PDaemonError("p2pd does not run")
        response = await super()._call_unary_protobuf_handler(peer_id, handle_name, input, output_protobuf_type)
        check_response(response, peer_id)
        return response


async def _exchange(request: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
    await write_pbmsg(writer, request)
    response = p2pd_pb2.Response()
    await read_pbmsg_safe(reader, response)
    if response.type == p2pd_pb2.Response.ERROR:
        raise P2PDaemonError(response.error.msg)
    return response


def _short(error: BaseException) -> str:
    return ascii(str(error) or type(error).__name__)[1:-1][:200]
