"""What hivemind's DHT may be asked, and what it may be told, checked before it sees it.

hivemind trusts its peers: node ids are self-chosen, a reply with an infinite expiry ends a search, a request may carry any
number of keys. Here a node id must be the hash of the libp2p identity that speaks, sizes are bounded, expiries are those
of our records, and one peer may have only so many calls under way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from protocol.dht_rules import MAX_TTL_S
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.libp2p_hivemind import DHTID, PeerID, dht_pb2

__all__ = ["MAX_CALLS", "MAX_CALLS_PER_PEER", "CallGuard", "check_response", "node_id"]

MAX_CALLS = 64
MAX_CALLS_PER_PEER = 8
MAX_KEYS_PER_STORE = 64
MAX_KEYS_PER_FIND = 4
"""An answer may carry a whole table per key, so this bounds what one question makes us build."""
_MAX_VALUE_BYTES = 1 << 20
_MAX_NEIGHBOURS = 32
_ID_BYTES = DHTID.HASH_NBYTES


def node_id(peer: PeerID) -> DHTID:
    """A peer's place in the DHT. It is not for the peer to choose, or strangers would gather around a key."""
    return DHTID.generate(source=peer.to_bytes())


def _expiry_is_sane(expires_at_s: float) -> bool:
    return 0.0 <= expires_at_s <= time.time() + MAX_TTL_S  # false for NaN


def _check_sender(info: Any, peer: PeerID) -> None:
    if info.node_id and info.node_id != node_id(peer).to_bytes():
        raise ProtocolError("a DHT node id is not that of its peer", peer=PeerId(peer.to_base58()))


def _check_request(request: Any, peer: PeerID) -> None:
    _check_sender(request.peer, peer)
    if isinstance(request, dht_pb2.PingRequest):
        return
    keys = request.keys
    limit = MAX_KEYS_PER_STORE if isinstance(request, dht_pb2.StoreRequest) else MAX_KEYS_PER_FIND
    if len(keys) > limit or any(len(key) != _ID_BYTES for key in keys):
        raise ProtocolError("a DHT request has too many or malformed keys")
    if isinstance(request, dht_pb2.StoreRequest):
        columns = (request.subkeys, request.values, request.expiration_time, request.in_cache)
        if any(len(column) != len(keys) for column in columns):
            raise ProtocolError("a DHT request is not aligned")
        if any(request.in_cache) or not all(map(_expiry_is_sane, request.expiration_time)):
            raise ProtocolError("a DHT request names the cache or an impossible expiry")
        if any(len(value) > _MAX_VALUE_BYTES for value in request.values):
            raise ProtocolError("a DHT record is too large")


def check_response(response: Any, peer: PeerID) -> None:
    """Check another node's answer to a DHT call.

    Raises:
        ProtocolError: it breaks the rules; hivemind then treats the node as silent.
    """
    if not isinstance(response, dht_pb2.PingResponse | dht_pb2.StoreResponse | dht_pb2.FindResponse):
        return
    _check_sender(response.peer, peer)
    if not isinstance(response, dht_pb2.FindResponse):
        return
    for result in response.results:
        neighbours = list(zip(result.nearest_node_ids, result.nearest_peer_ids, strict=False))
        if len(result.nearest_node_ids) != len(result.nearest_peer_ids) or len(neighbours) > _MAX_NEIGHBOURS:
            raise ProtocolError("a DHT answer has too many or misaligned neighbours", peer=PeerId(peer.to_base58()))
        if any(node != node_id(PeerID(other)).to_bytes() for node, other in neighbours):
            raise ProtocolError("a DHT answer names a node id that is not its peer's", peer=PeerId(peer.to_base58()))
        if not _expiry_is_sane(result.expiration_time) or len(result.value) > _MAX_VALUE_BYTES:
            raise ProtocolError("a DHT answer has an impossible expiry or size", peer=PeerId(peer.to_base58()))


class CallGuard:
    """Bounds the incoming calls that are under way at once, and checks each one's request."""

    def __init__(self) -> None:
        self._calls: Counter[bytes] = Counter()

    def wrap(self, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """A handler that refuses what this guard does not let through, and otherwise is `handler`."""

        async def guarded(request: Any, context: Any) -> Any:
            peer = context.remote_id
            name = peer.to_bytes()
            if self._calls[name] >= MAX_CALLS_PER_PEER or self._calls.total() >= MAX_CALLS:
                raise ProtocolError("too many calls at once", peer=PeerId(peer.to_base58()))
            _check_request(request, peer)
            self._calls[name] += 1
            try:
                return await handler(request, context)
            finally:
                self._calls[name] -= 1
                if not self._calls[name]:
                    del self._calls[name]

        return guarded
