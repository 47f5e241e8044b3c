"""A few whole peers on one memory network, each with its own folder, steered by a test in virtual time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch

from node.compute import VirtualCompute
from node.events import EventLog
from node.peer import Peer, PeerOptions, Summary
from protocol.blobs import BlobStore
from protocol.directory import validate_entry
from protocol.identity import Identity
from protocol.memory import LinkSpec, MemoryNetwork, MemoryTransport
from protocol.publication import SignedManifest

__all__ = ["MemorySwarm", "phi"]


def phi(peer: Peer) -> torch.Tensor:
    """A copy of its slow weights, fp32 [P]."""
    assert peer.trainer is not None
    return peer.trainer.replica.phi.clone()


class MemorySwarm:
    """Peers by name."""

    def __init__(self, signed: SignedManifest, seed_store: BlobStore, folder: Path) -> None:
        self.signed, self.seed_store, self.folder = signed, seed_store, folder
        self.network = MemoryNetwork(link=LinkSpec(latency_s=0.01, bytes_per_s=1e7))
        self.peers: dict[str, Peer] = {}
        self.events: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        self.summaries: dict[str, Summary] = {}

    async def live(
        self, name: str, *, rounds: int = 0, own_store: bool = False, step_s: float = 0.3, **options: Any
    ) -> Summary:
        """One peer's whole life."""
        identity = Identity.generate(name.encode().ljust(32, b"."))
        home = self.folder / name
        home.mkdir(exist_ok=True)
        log = self.events.setdefault(name, [])
        events = EventLog()
        events.listen(lambda event, fields: log.append((event, fields)))
        async with MemoryTransport(self.network, identity.peer_id, validator=validate_entry) as transport:
            peer = self.peers[name] = Peer(
                self.signed,
                identity=identity,
                transport=transport,
                store=BlobStore(home / "blobs") if own_store else self.seed_store,
                compute=VirtualCompute(seconds_per_call=step_s),
                events=events,
                folder=home,
                options=PeerOptions(name=name, sequences=4, max_rounds=rounds, **options),
            )
            self.summaries[name] = await peer.run()
            return self.summaries[name]

    async def until(self, name: str, event: str, **fields: Any) -> None:
        """Wait until a peer has told of such an event, with these fields among others."""
        # An event of asyncio would need the peer's event log, which may not exist yet; and virtual time costs nothing.
        while not any(fields.items() <= told.items() for told in self.named(name, event)):  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    async def reached(self, round: int) -> None:
        """Wait until all peers are in that round or a later one."""
        while min(peer.progress.round for peer in self.peers.values()) < round:  # noqa: ASYNC110 - see `until`
            await asyncio.sleep(1.0)

    def named(self, name: str, event: str) -> list[dict[str, Any]]:
        """The fields of all events of one kind that a peer told of."""
        return [fields for kind, fields in self.events.get(name, []) if kind == event]
