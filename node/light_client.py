"""Asks one peer one thing, without becoming a peer: the client behind `llm-node status` and `llm-node plan --peer`.

It speaks libp2p through py-libp2p (trio), an implementation that shares no code with the go-libp2p daemon the peers run, so it
also shows that our protocols can be read by others. py-libp2p and hivemind define the same protobuf symbols and can not
live in one process: import this module only where neither hivemind nor torch is loaded. Importing it takes about half
a second, nearly all of it py-libp2p's.

Only TLS is offered as security, which is what our p2pd speaks: py-libp2p would by default also accept plaintext, under which
anybody on the path could pose as the peer. The handshake proves that the other side holds the key in the address.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import libp2p
import trio
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair as new_ed25519_keys
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.exceptions import StreamFailure
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from libp2p.security.tls.transport import PROTOCOL_ID as TLS
from libp2p.security.tls.transport import TLSTransport
from multiaddr import Multiaddr

from protocol.errors import LlmNodeError, ProtocolError, UserError, first_leaf
from protocol.libp2p_addresses import split_address

__all__ = ["fetch_frame"]

_READ_BYTES = 1 << 16

_NETWORK_ERRORS = (BaseLibp2pError, OSError, EOFError, trio.BrokenResourceError, trio.ClosedResourceError)


def fetch_frame(address: str, protocol: str, *, what: str, max_bytes: int, timeout_s: float = 15.0) -> bytes:
    """The one frame that the peer at `address` writes on a stream of this protocol. Runs its own trio loop; call it from no other.

    Args:
        address: multiaddress of TCP kind ending in `/p2p/<peer id>`, as peers print it.
        what: is asked for, as errors name it.
        max_bytes: longest frame to accept.
        timeout_s: for everything together: dialling, handshake and transfer.

    Raises:
        UserError: the address is malformed, nobody answers there, somebody else does, or the peer does not serve that.
        ProtocolError: the peer answered with a longer frame.
    """
    address = address.strip()
    peer = _parse_address(address)
    # py-libp2p logs every failed attempt to stderr; what matters is in the error that is raised.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL + 1)
    try:
        outcome = trio.run(_fetch, peer, protocol, what, max_bytes, timeout_s)
    except ExceptionGroup as group:
        # py-libp2p's own tasks fail as a group, for instance when the other side breaks its framing.
        raise UserError(
            f"{address} broke off the connection ({type(first_leaf(group)).__name__}); is it an llm-node peer?"
        ) from None
    if isinstance(outcome, bytes):
        return outcome
    if isinstance(outcome, LlmNodeError):
        raise outcome
    raise UserError(_explain(address, what, outcome, timeout_s)) from None


def _parse_address(address: str) -> PeerInfo:
    path, peer = split_address(address)
    if "/p2p-circuit" in path:
        raise UserError(f"{address} leads through a relay; ask a peer that can be dialled directly")
    if not peer.startswith("12D3KooW"):
        raise UserError(f"{address} is not an address of ours, whose peer ids begin with 12D3KooW; copy it again")
    return info_from_p2p_addr(Multiaddr(f"{_resolved(path)}/p2p/{peer}"))


def _resolved(path: str) -> str:
    """`path` with a host name replaced by its first address: py-libp2p's TCP dials numbers only."""
    _, kind, host, tcp, port = path.split("/")
    if not kind.startswith("dns"):
        return path
    family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(kind, socket.AF_UNSPEC)
    try:
        found = socket.getaddrinfo(host, int(port), family, socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):  # the latter for labels over 63 characters
        raise UserError(f"host name {host} can not be resolved; check its spelling and your network") from None
    version = "ip6" if found[0] == socket.AF_INET6 else "ip4"
    return f"/{version}/{found[4][0]}/{tcp}/{port}"


async def _fetch(peer: PeerInfo, protocol: str, what: str, max_bytes: int, timeout_s: float) -> bytes | Exception:
    """The frame, or what went wrong: raised inside the host it would come out wrapped in a group."""
    keys = new_ed25519_keys()
    host = libp2p.new_host(key_pair=keys, sec_opt={TLS: TLSTransport(keys)})
    outcome: bytes | Exception = TimeoutError()
    with trio.move_on_after(timeout_s):
        async with host.run(listen_addrs=[]):
            try:
                await host.connect(peer)
                stream = await host.new_stream(peer.peer_id, [TProtocol(protocol)])
                outcome = await _read_frame(stream, what, max_bytes)
            except (LlmNodeError, *_NETWORK_ERRORS) as error:
                outcome = error
    return outcome


async def _read_frame(stream: INetStream, what: str, max_bytes: int) -> bytes:
    num_bytes = int.from_bytes(await _read_exactly(stream, 4), "big")
    if num_bytes > max_bytes:
        raise ProtocolError(f"{what} of {num_bytes} bytes exceeds {max_bytes}")
    return await _read_exactly(stream, num_bytes)


async def _read_exactly(stream: INetStream, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        chunk = await stream.read(min(num_bytes - len(data), _READ_BYTES))
        if not chunk:
            raise EOFError(f"stream ended after {len(data)} of {num_bytes} bytes")
        data += chunk
    return bytes(data)


def _explain(address: str, what: str, error: Exception, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"{address} did not answer within {timeout_s:g} s; check the address, and that the peer is running"
    if isinstance(error, StreamFailure):
        return f"{address} is there but serves no {what}; is it an llm-node peer of this version?"
    if isinstance(error, EOFError):
        return f"{address} broke off in the middle of its {what}; try again"
    if any("Peer ID mismatch" in str(cause) for cause in _causes(error)):
        return f"something answers at {address}, but it is not that peer; ask for the peer's present address"
    return f"{address} can not be reached; check the address, and that the peer is running and its port open"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and all that led to it; py-libp2p keeps one list of them for the attempts at all addresses."""
    while error is not None:
        yield error
        for attempt in getattr(error, "errors", ()):
            yield from _causes(attempt)
        error = error.__cause__
