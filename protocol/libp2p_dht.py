"""Our record table on hivemind's DHT: its routing and its calls, but our own storage, search and rules.

A record travels as msgpack `[key, value]` under the hash of its key, so that a node that only sees the hash can hand the real
key to the validator. hivemind's own storage is replaced because it lets a refused older record shorten the life of a
newer one, grows without bound, and hands its inner dictionaries out; its own search because one node's claim of an endless
expiry stops it, and because it remembers old answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import Any

from protocol.dht_rules import MAX_TTL_S, Validator, is_admissible
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.libp2p_daemon import Daemon
from protocol.libp2p_guard import node_id
from protocol.libp2p_hivemind import (
    DHTID,
    DHTNode,
    DHTRecord,
    DictionaryDHTValue,
    MSGPackSerializer,
    PeerID,
    RecordValidatorBase,
    ValueWithExpiration,
    traverse_dht,
)
from protocol.transport import Dht, DhtEntry

__all__ = ["MAX_BYTES_PER_KEY", "MAX_ENTRIES_PER_KEY", "MAX_KEYS", "BoundedStorage", "Libp2pDht", "RecordValidator"]

MAX_KEYS = 1024
MAX_ENTRIES_PER_KEY = 512
MAX_BYTES_PER_KEY = 768 << 10
MAX_TOTAL_BYTES = 32 << 20

_NUM_REPLICAS = 8
_NUM_SEARCH_WORKERS = 4
_CALL_TIMEOUT_S = 3.0
_SILENT_PEER_PAUSE_S = 5.0
_MAX_REMEMBERED_SILENT_PEERS = 4096


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind is untyped
    """Applies our rules and the application's validator to every record that hivemind takes in."""

    def __init__(self, validator: Validator | None) -> None:
        self._validator = validator

    def validate(self, record: DHTRecord) -> bool:
        now_s = time.time()
        if record.expiration_time <= now_s:
            return True  # not worth refusing a whole answer for: storage and search drop it
        opened = open_record(record.subkey, record.value)
        if opened is None:
            return False
        key, subkey, value = opened
        if DHTID.generate(source=key).to_bytes() != record.key:
            return False
        return is_admissible(self._validator, key, subkey, value, record.expiration_time, now_s)


def open_record(packed_subkey: bytes, packed_value: bytes) -> tuple[str, str, bytes] | None:
    """Unpack a record into (key, subkey, value); None if it is not one of ours."""
    try:
        subkey, envelope = MSGPackSerializer.loads(packed_subkey), MSGPackSerializer.loads(packed_value)
    except (ProtocolError, ValueError, TypeError):
        return None
    match envelope:
        case [str() as key, bytes() as value] if isinstance(subkey, str):
            return key, subkey, value
    return None


class BoundedStorage:
    """Records of this node by key and subkey, with hard limits; has the methods that hivemind calls on its storage.

    The later expiry wins. When full, new keys and subkeys are refused while old ones may still be replaced, so a flood
    delays newcomers by at most MAX_TTL_S and never evicts anyone.
    """

    def __init__(self) -> None:
        self._tables: dict[DHTID, dict[str, tuple[bytes, float]]] = {}
        self.total_bytes = 0

    def store(self, key: DHTID, value: bytes, expiration_time: float, subkey: object = None) -> bool:
        """Plain values are never kept; see `store_subkey`."""
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: DHTID, subkey: object, value: bytes, expiration_time: float) -> bool:
        """Keep a record if it expires later than the one it replaces, and there is room."""
        now_s = time.time()
        if not isinstance(subkey, str) or not now_s < expiration_time <= now_s + MAX_TTL_S:
            return False
        table = self._live_table(key)
        if not table:
            self._make_room()
            if len(self._tables) >= MAX_KEYS:
                return False
        old_value, old_expiry_s = table.get(subkey, (b"", 0.0))
        growth = len(value) - len(old_value)
        full = (subkey not in table and len(table) >= MAX_ENTRIES_PER_KEY) or (
            sum(len(other) for other, _ in table.values()) + growth > MAX_BYTES_PER_KEY
        )
        if expiration_time <= old_expiry_s or full or self.total_bytes + growth > MAX_TOTAL_BYTES:
            return False
        self._tables.setdefault(key, table)[subkey] = value, expiration_time
        self.total_bytes += growth
        return True

    def get(self, key: DHTID) -> ValueWithExpiration | None:
        """All live records under `key` as a fresh dictionary of hivemind's kind."""
        table = self._live_table(key)
        if not table:
            return None
        dictionary = DictionaryDHTValue()
        for subkey, (value, expires_at_s) in table.items():
            dictionary.store(subkey, value, expires_at_s)
        return ValueWithExpiration(dictionary, dictionary.latest_expiration_time)

    def items(self) -> Iterator[tuple[DHTID, ValueWithExpiration]]:
        """All keys with their live records."""
        for key in list(self._tables):
            if (found := self.get(key)) is not None:
                yield key, found

    def _live_table(self, key: DHTID) -> dict[str, tuple[bytes, float]]:
        """The table of `key` without what has expired; an unattached empty one if nothing is left."""
        table = self._tables.get(key)
        if table is None:
            return {}
        now_s = time.time()
        for subkey in [subkey for subkey, (_, expires_at_s) in table.items() if expires_at_s <= now_s]:
            self.total_bytes -= len(table.pop(subkey)[0])
        if not table:
            del self._tables[key]
        return table

    def _make_room(self) -> None:
        if len(self._tables) >= MAX_KEYS or self.total_bytes > MAX_TOTAL_BYTES // 2:
            for key in list(self._tables):
                self._live_table(key)


class Libp2pDht(Dht):
    """The table as seen from one node.

    Args:
        daemon: what the calls travel through.
        validator: of the application.
    """

    def __init__(self, daemon: Daemon, validator: Validator | None) -> None:
        self._daemon = daemon
        self._validator = RecordValidator(validator)
        self._node: Any = None
        self._storage = BoundedStorage()
        self._last_expiry_s: dict[tuple[str, str], float] = {}

    async def start(self) -> None:
        """Begin to answer other nodes; the daemon must run."""
        self._node = await DHTNode.create(
            p2p=self._daemon,
            node_id=node_id(self._daemon.peer_id),
            num_replicas=_NUM_REPLICAS,
            wait_timeout=_CALL_TIMEOUT_S,
            blacklist_time=_SILENT_PEER_PAUSE_S,
            backoff_rate=1.0,  # hivemind's pause doubles without end, and a peer that came back would stay unheard
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            reuse_get_requests=False,
            record_validator=self._validator,
        )
        self._node.protocol.storage = self._storage

    def knows(self, peer: PeerId) -> bool:
        """Whether the routing table holds `peer`."""
        return PeerID.from_base58(peer) in self._node.protocol.routing_table

    @property
    def num_neighbours(self) -> int:
        """Number of peers in the routing table."""
        return len(self._node.protocol.routing_table.peer_id_to_uid)

    async def join(self, peers: Iterable[PeerId]) -> int:
        """Get acquainted with connected peers; returns how many of them answered."""
        pings = (self._node.protocol.call_ping(PeerID.from_base58(peer)) for peer in peers)
        num_answers = sum(answer is not None for answer in await asyncio.gather(*pings))
        if num_answers:
            await self._node.find_nearest_nodes([self._node.node_id])
        return num_answers

    def tidy(self) -> None:
        """Drop what hivemind remembers of silent peers for ever."""
        if len(self._node.blacklist.ban_counter) > _MAX_REMEMBERED_SILENT_PEERS:
            self._node.blacklist.clear()

    async def store(self, key: str, subkey: str, value: bytes, *, ttl_s: float) -> bool:
        assert 0.0 < ttl_s <= MAX_TTL_S, "the caller chooses a possible time to live"
        now_s = time.time()
        # Of two records under one subkey the later expiry wins, so a replacement must never expire earlier.
        expires_at_s = max(now_s + ttl_s, self._last_expiry_s.get((key, subkey), 0.0) + 1e-3)
        self._last_expiry_s = {name: at_s for name, at_s in self._last_expiry_s.items() if at_s > now_s}
        self._last_expiry_s[key, subkey] = expires_at_s
        key_id, packed = DHTID.generate(source=key), MSGPackSerializer.dumps([key, bytes(value)])
        nearest = (await self._node.find_nearest_nodes([key_id], k_nearest=_NUM_REPLICAS))[key_id]
        own = DHTRecord(key_id.to_bytes(), MSGPackSerializer.dumps(subkey), packed, expires_at_s)
        stored_here = (
            self._node.node_id in nearest
            and self._validator.validate(own)
            and self._storage.store_subkey(key_id, subkey, packed, expires_at_s)
        )
        calls = (
            self._node.protocol.call_store(peer, [key_id], [packed], expires_at_s, subkeys=[subkey])
            for node, peer in nearest.items()
            if node != self._node.node_id
        )
        return stored_here | any(bool(answer and answer[0]) for answer in await asyncio.gather(*calls))

    async def get(self, key: str) -> list[DhtEntry]:
        key_id = DHTID.generate(source=key)
        found: dict[str, DhtEntry] = {}
        self._collect(key, self._storage.get(key_id), found)
        routing_table, own_id = self._node.protocol.routing_table, self._node.node_id
        beam = self._node.protocol.bucket_size
        peers = dict(routing_table.get_nearest_neighbors(key_id, beam, exclude=own_id))

        async def ask(node: DHTID, queries: object) -> dict[DHTID, tuple[tuple[DHTID, ...], bool]]:
            answer = await self._node._call_find_with_blacklist(peers[node], [key_id])
            value, neighbours = (answer or {}).get(key_id, (None, {}))
            peers.update(neighbours)
            self._collect(key, value, found)
            return {key_id: (tuple(neighbours), False)}

        await traverse_dht(
            [key_id],
            initial_nodes=list(peers),
            beam_size=beam,
            num_workers=_NUM_SEARCH_WORKERS,
            queries_per_call=1,
            get_neighbors=ask,
            visited_nodes={key_id: {own_id}},
        )
        return list(found.values())

    def _collect(self, key: str, answer: ValueWithExpiration | None, found: dict[str, DhtEntry]) -> None:
        """Merge one node's records; the later expiry wins. hivemind has had them validated, when it took them in."""
        if answer is None or not isinstance(answer.value, DictionaryDHTValue):
            return
        now_s = time.time()
        with answer.value.freeze():
            records = list(answer.value.items())
        for subkey, (packed, expires_at_s) in records:
            opened = open_record(MSGPackSerializer.dumps(subkey), packed)
            if opened is None or opened[0] != key or not expires_at_s > now_s:
                continue
            known = found.get(subkey)
            if known is None or known.expires_at_s < expires_at_s:
                found[subkey] = DhtEntry(subkey=subkey, value=opened[2], expires_at_s=expires_at_s)
