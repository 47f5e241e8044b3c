"""A peer's neighbourhood for unit tests: a memory network with a store and a transport per peer, and records made by hand."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.events import EventLog
from protocol.blob_exchange import serve_blobs
from protocol.blobs import BlobStore
from protocol.directory import validate_entry
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from protocol.records import PeerRecord, SnapshotRef
from tests.protocol.samples import identity, record

__all__ = ["Node", "listening", "neighbourhood", "reference", "trainers"]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One peer's network side; it serves its blobs."""

    identity: Identity
    transport: MemoryTransport
    store: BlobStore

    @property
    def peer(self) -> PeerId:
        """Its id."""
        return self.identity.peer_id


@contextlib.asynccontextmanager
async def neighbourhood(folder: Path, num_nodes: int) -> AsyncIterator[list[Node]]:
    """Nodes on one network; the first is usually the one under test."""
    network = MemoryNetwork(link=LinkSpec(latency_s=0.01, bytes_per_s=1e8))
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for number in range(num_nodes):
            own = identity(number)
            transport = MemoryTransport(network, own.peer_id, validator=validate_entry)
            await stack.enter_async_context(transport)
            store = BlobStore(folder / f"blobs-{number}")
            serve_blobs(transport, store)
            nodes.append(Node(identity=own, transport=transport, store=store))
        yield nodes


def reference(round: int, data: bytes, *holders: Node) -> SnapshotRef:
    """Give a snapshot to these nodes, and name it."""
    (root,) = {holder.store.put(data) for holder in holders}
    return SnapshotRef(round=round, root=root, size_bytes=len(data))


def trainers(offers: dict[int, list[SnapshotRef]], *, round: int = 8) -> dict[PeerId, PeerRecord]:
    """Records of training peers: number → the snapshots it lists."""
    return {
        identity(number).peer_id: record(identity(number), round=round, snapshots=refs)
        for number, refs in offers.items()
    }


def listening() -> tuple[EventLog, list[tuple[str, dict[str, Any]]]]:
    """An event log and what it is told."""
    log, heard = EventLog(), list[tuple[str, dict[str, Any]]]()
    log.listen(lambda event, fields: heard.append((event, fields)))
    return log, heard
