"""Directories that share a table in place of a DHT."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from protocol.directory import (
    Directory,
    validate_entry,
)
from protocol.errors import StreamClosedError
from protocol.ids import PeerId, RunId
from protocol.records import PeerRecord
from protocol.transport import Dht, DhtEntry
from tests.protocol.samples import RUN, SENT_AT_S, identity, record

__all__ = ["RUN_ID", "Peer", "TableDht"]

RUN_ID = RunId(RUN)


class TableDht(Dht):
    """A table in one place, for directories that share it; its clock is the loop's."""

    def __init__(self) -> None:
        self.table: dict[str, dict[str, DhtEntry]] = defaultdict(dict)
        self.is_down = False
        self.num_reads = 0

    def now_s(self) -> float:
        return SENT_AT_S + asyncio.get_running_loop().time()

    async def store(self, key: str, subkey: str, value: bytes, *, ttl_s: float) -> bool:
        if self.is_down:
            raise StreamClosedError("the network is down")
        now_s = self.now_s()
        if validate_entry(key, subkey, value, now_s + ttl_s, now_s):
            self.table[key][subkey] = DhtEntry(subkey=subkey, value=value, expires_at_s=now_s + ttl_s)
            return True
        return False

    async def get(self, key: str) -> list[DhtEntry]:
        if self.is_down:
            raise StreamClosedError("the network is down")
        self.num_reads += 1
        return [entry for entry in self.table[key].values() if entry.expires_at_s > self.now_s()]


class Peer:
    """A directory and what it publishes."""

    def __init__(self, number: int, dht: TableDht, ttl_s: float = 45.0) -> None:
        self.identity = identity(number)
        self.directory = Directory(dht=dht, identity=self.identity, run=RUN_ID, ttl_s=ttl_s)
        self.id = self.identity.peer_id
        self._dht = dht
        self._sequence = 0

    async def publish(self, **changes: Any) -> bool:
        self._sequence += 1
        fields = {"sequence": self._sequence, "sent_at_s": self._dht.now_s()} | changes
        return await self.directory.publish(record(self.identity, **fields))

    async def refresh(self) -> Mapping[PeerId, PeerRecord]:
        return await self.directory.refresh()
