"""The record table of the in-process network: who holds which record, and one peer's view of it.

A record lives on the NUM_REPLICAS live and reachable peers nearest to its key (XOR of SHA-256 positions, as in Kademlia), each
of which checks it; so records are lost when all of them crash, and the two halves of a split network see different tables. A
look-up takes as many round trips as Kademlia needs hops: the logarithm of the swarm's size to the base of its bucket size.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Protocol

from protocol.dht_rules import MAX_TTL_S, Validator, is_admissible
from protocol.ids import PeerId
from protocol.memory_links import Counts
from protocol.transport import Dht, DhtEntry

__all__ = ["NUM_REPLICAS", "Holder", "Keyspace", "MemoryDht", "Neighbourhood", "position_of"]

NUM_REPLICAS = 8
_BUCKET_SIZE = 20
"""Contacts per distance that a Kademlia node knows: every hop comes nearer by this factor."""
_POSITION_BITS = 256
_PRUNE_EVERY_RECORDS = 32
"""Expired records are dropped once per so many taken; readers look at the expiry anyway."""


def position_of(name: str) -> int:
    """Where a peer id or a key lies among 2^256 positions."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest())


class Neighbourhood(Protocol):
    """What the table asks of the network; see protocol/memory.py."""

    keyspace: Keyspace

    def now_s(self) -> float: ...

    def nearest(self, key: str, asker: PeerId) -> Sequence[Holder]: ...

    def dht_hop_s(self, peer: PeerId, *what: object) -> float: ...


class Holder(Protocol):
    """A peer as far as the table is concerned."""

    peer_id: PeerId
    position: int
    alive: bool
    counts: Counts
    dht: MemoryDht

    @property
    def network(self) -> Neighbourhood: ...


class Keyspace:
    """The live peers in the order of their positions, so that those nearest to a key are found without looking at all."""

    def __init__(self) -> None:
        self._positions: list[int] = []
        self._holders: dict[int, Holder] = {}

    def __len__(self) -> int:
        return len(self._positions)

    def add(self, holder: Holder) -> None:
        """Let `holder` hold records."""
        insort(self._positions, holder.position)
        self._holders[holder.position] = holder

    def remove(self, holder: Holder) -> None:
        """The opposite of `add`."""
        del self._positions[bisect_left(self._positions, holder.position)]
        del self._holders[holder.position]

    def nearest(self, target: int) -> Iterator[Holder]:
        """All peers by their XOR distance from `target`; the peers must not change meanwhile."""
        stack = [(0, len(self._positions), _POSITION_BITS - 1)]
        while stack:
            low, high, bit = stack.pop()
            if high - low > 1:  # positions that agree in all bits above `bit`: split them by it
                ones_start = (self._positions[low] >> (bit + 1) << (bit + 1)) | (1 << bit)
                middle = bisect_left(self._positions, ones_start, low, high)
                halves = [(low, middle, bit - 1), (middle, high, bit - 1)]
                stack += halves if target >> bit & 1 else reversed(halves)
            elif high > low:
                yield self._holders[self._positions[low]]


class MemoryDht(Dht):
    """One peer's view of the network's table, and its own share of it."""

    def __init__(self, transport: Holder, validator: Validator | None) -> None:
        self.table: dict[str, dict[str, DhtEntry]] = {}
        self._transport = transport
        self.validator = validator
        self._num_taken = 0
        self._last_expiry_s: dict[tuple[str, str], float] = {}

    async def store(self, key: str, subkey: str, value: bytes, *, ttl_s: float) -> bool:
        assert 0.0 < ttl_s <= MAX_TTL_S, "the caller chooses a possible time to live"
        network = self._transport.network
        self._transport.counts.dht_stores += 1
        await self._lookup_delay("store", key)
        # Of two records under one subkey the later expiry wins, so a replacement must never expire earlier.
        earliest_s = self._last_expiry_s.get((key, subkey), 0.0) + 1e-3
        entry = DhtEntry(subkey=subkey, value=bytes(value), expires_at_s=max(network.now_s() + ttl_s, earliest_s))
        self._last_expiry_s[key, subkey] = entry.expires_at_s
        if not self._transport.alive:
            return False
        verdicts: dict[Validator | None, bool] = {}  # holders with one validator need to ask it only once
        num_takers = 0
        for holder in network.nearest(key, self._transport.peer_id):
            validator = holder.dht.validator
            if validator not in verdicts:
                verdicts[validator] = holder.dht.is_valid(key, entry)
            num_takers += verdicts[validator] and holder.dht.take(key, entry)
        return num_takers > 0

    async def get(self, key: str) -> list[DhtEntry]:
        self._transport.counts.dht_gets += 1
        await self._lookup_delay("get", key)
        if not self._transport.alive:
            return []
        now_s = self._transport.network.now_s()
        best: dict[str, DhtEntry] = {}
        trusted: dict[str, DhtEntry] = {}
        for holder in self._transport.network.nearest(key, self._transport.peer_id):
            records = holder.dht.table.get(key, {})
            if holder.dht.validator is self.validator:
                if records == trusted:  # most holders have the very same records as the one before
                    continue
                trusted = records
            for entry in records.values():
                known = best.get(entry.subkey)
                if known is entry or (known is not None and known.expires_at_s >= entry.expires_at_s):
                    continue
                if self._believes(holder.dht, key, entry, now_s):
                    best[entry.subkey] = entry
        return list(best.values())

    def _believes(self, holder: MemoryDht, key: str, entry: DhtEntry, now_s: float) -> bool:
        """Whether what `holder` sends is valid. A holder with our validator has asked it already, and what it has accepted
        stays acceptable until it expires."""
        return entry.expires_at_s > now_s and (holder.validator is self.validator or self.is_valid(key, entry))

    def take(self, key: str, entry: DhtEntry) -> bool:
        """Keep a valid record that another peer (or this one) sends, if it expires later than ours."""
        records = self.table.setdefault(key, {})
        known = records.get(entry.subkey)
        if known is not None and known.expires_at_s >= entry.expires_at_s:
            return False
        records[entry.subkey] = entry
        self._num_taken += 1
        if self._num_taken % _PRUNE_EVERY_RECORDS == 0:
            now_s = self._transport.network.now_s()
            self.table[key] = {name: old for name, old in records.items() if old.expires_at_s > now_s}
        return True

    def is_valid(self, key: str, entry: DhtEntry) -> bool:
        """Whether our validator would keep the record now."""
        now_s = self._transport.network.now_s()
        return is_admissible(self.validator, key, entry.subkey, entry.value, entry.expires_at_s, now_s)

    async def _lookup_delay(self, *what: str) -> None:
        network = self._transport.network
        num_hops = max(1, math.ceil(math.log(max(len(network.keyspace), 1), _BUCKET_SIZE)))
        self._transport.counts.dht_hops += num_hops
        await asyncio.sleep(sum(network.dht_hop_s(self._transport.peer_id, hop, *what) for hop in range(num_hops)))
