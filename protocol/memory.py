"""The in-process network: the same interface as the real one, in virtual time and under the test's control.

A `MemoryNetwork` holds any number of `MemoryTransport`s. Links have latency, bandwidth and loss; peers crash; the network
splits and heals. On a `VirtualTimeLoop` a run is exactly repeatable for a seed. What is modelled after the real network:

- A partition does not reset streams: nothing arrives until it heals, and after KEEPALIVE_S the streams across it break.
- Opening a stream takes one round trip, and hangs until its deadline across a partition.
- A DHT record lives on the NUM_REPLICAS live and reachable peers nearest to its key, which check it; so records are lost
  when all of them crash, and the two halves of a split network see different tables.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from types import TracebackType
from typing import Self

from protocol.dht_rules import MAX_TTL_S, Validator, is_admissible
from protocol.errors import DeadlineError, PeerUnreachableError, UserError
from protocol.ids import PeerId
from protocol.incoming import Incoming
from protocol.memory_stream import LinkSpec, MemoryStream, Pipe, Wire
from protocol.transport import Dht, DhtEntry, Handler, Stream, Traffic, Transport
from protocol.virtual_time import VirtualTimeLoop, run_virtual

__all__ = ["LinkSpec", "MemoryDht", "MemoryNetwork", "MemoryTransport", "Validator", "run_virtual"]

KEEPALIVE_S = 30.0
NUM_REPLICAS = 8
VIRTUAL_EPOCH_S = 1.7e9


class MemoryNetwork:
    """The wires, the clock and the chance between `MemoryTransport`s.

    Args:
        seed: of the losses.
        link: how every path behaves that `set_link` does not name.
    """

    def __init__(self, *, seed: int = 0, link: LinkSpec | None = None) -> None:
        self.transports: dict[PeerId, MemoryTransport] = {}
        self._random = random.Random(seed)
        self.default_link = link or LinkSpec()
        self._links: dict[frozenset[PeerId], LinkSpec] = {}
        self._wires: dict[tuple[PeerId, PeerId], Wire] = {}
        self._groups: dict[PeerId, int] = {}
        self._splits = 0
        self.repartitioned = asyncio.Event()
        """Set, and replaced by a new one, whenever a partition begins or ends."""
        self._streams: dict[MemoryStream, PeerId] = {}  # every live end and whose it is, in order of opening
        self._prune_above = 64

    def now_s(self) -> float:
        """Unix time: the machine's, or a fixed epoch plus virtual time."""
        loop = asyncio.get_running_loop()
        return VIRTUAL_EPOCH_S + loop.time() if isinstance(loop, VirtualTimeLoop) else time.time()

    def set_link(self, a: PeerId, b: PeerId, spec: LinkSpec) -> None:
        """Change the path between two peers, for what is sent from now on."""
        self._links[frozenset((a, b))] = spec
        for ends in ((a, b), (b, a)):
            if ends in self._wires:
                self._wires[ends].spec = spec

    def link(self, a: PeerId, b: PeerId) -> LinkSpec:
        """How the path between two peers behaves now."""
        return self._links.get(frozenset((a, b)), self.default_link)

    def partition(self, *groups: list[PeerId] | set[PeerId]) -> None:
        """Split the network; peers named in no group form one more. Replaces an earlier partition."""
        self._splits += 1
        self._groups = {peer: index for index, group in enumerate(groups, start=1) for peer in group}
        asyncio.get_running_loop().call_later(KEEPALIVE_S, self._break_streams_across, self._splits)
        self._repartition()

    def heal(self) -> None:
        """End the partition; what was under way arrives now."""
        self._splits += 1
        self._groups = {}
        self._repartition()

    def crash(self, peer: PeerId) -> None:
        """Kill a peer: its streams are reset, its handlers end, its DHT records go, and nobody reaches it any more.

        What else the peer runs goes on and meets a dead network. A new transport with the same id is its restart.
        """
        transport = self.transports.pop(peer)
        transport.alive = False
        transport.dht.table.clear()
        transport.incoming.cancel()
        self._break([stream for stream, owner in self._streams.items() if peer in (owner, stream.peer)])

    def connected(self, a: PeerId, b: PeerId) -> bool:
        """Whether bytes flow between the two, as far as partitions go."""
        return self._groups.get(a, 0) == self._groups.get(b, 0)

    def nearest(self, key: str, asker: PeerId) -> list[MemoryTransport]:
        """The live peers that hold records under `key`, as far as `asker` reaches them."""
        target = _position(key)
        near = [other for other in self.transports.values() if self.connected(asker, other.peer_id)]
        near.sort(key=lambda other: other.position ^ target)
        return near[:NUM_REPLICAS]

    def wire_streams(self, caller: MemoryTransport, callee: MemoryTransport) -> tuple[MemoryStream, MemoryStream]:
        """Make the two ends of a new stream."""
        here, there = caller.peer_id, callee.peer_id

        def blocked() -> bool:
            return not self.connected(here, there)

        def breaks() -> bool:
            loss = self.link(here, there).loss
            return loss > 0.0 and self._random.random() < loss

        out = Pipe(self._wire(here, there), blocked=blocked)
        back = Pipe(self._wire(there, here), blocked=blocked)
        near = MemoryStream(peer=there, outgoing=out, incoming=back, traffic=caller.traffic, breaks=breaks)
        far = MemoryStream(peer=here, outgoing=back, incoming=out, traffic=callee.traffic, breaks=breaks)
        if len(self._streams) > self._prune_above:
            self._streams = {stream: owner for stream, owner in self._streams.items() if not stream.is_over}
            self._prune_above = 64 + 2 * len(self._streams)
        self._streams[near], self._streams[far] = here, there
        return near, far

    async def close_streams(self, peer: PeerId) -> None:
        """Close this peer's ends in an orderly way: what it wrote before still arrives."""
        for stream in [stream for stream, owner in self._streams.items() if owner == peer]:
            await stream.close()
            del self._streams[stream]

    def _wire(self, source: PeerId, target: PeerId) -> Wire:
        return self._wires.setdefault((source, target), Wire(self.link(source, target)))

    def _repartition(self) -> None:
        self.repartitioned.set()
        self.repartitioned = asyncio.Event()
        for stream in self._streams:
            stream.pump()

    def _break_streams_across(self, split: int) -> None:
        if split != self._splits:
            return
        self._break([stream for stream, owner in self._streams.items() if not self.connected(owner, stream.peer)])

    def _break(self, streams: list[MemoryStream]) -> None:
        for stream in streams:
            stream.reset()
            del self._streams[stream]


def _position(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest())


class MemoryDht(Dht):
    """One peer's view of the network's table, and its own share of it."""

    def __init__(self, transport: MemoryTransport, validator: Validator | None) -> None:
        self.table: dict[str, dict[str, DhtEntry]] = {}
        self._transport = transport
        self._validator = validator
        self._last_expiry_s: dict[tuple[str, str], float] = {}

    async def store(self, key: str, subkey: str, value: bytes, *, ttl_s: float) -> bool:
        assert 0.0 < ttl_s <= MAX_TTL_S, "the caller chooses a possible time to live"
        network = self._transport.network
        await self._lookup_delay()
        # Of two records under one subkey the later expiry wins, so a replacement must never expire earlier.
        earliest_s = self._last_expiry_s.get((key, subkey), 0.0) + 1e-3
        entry = DhtEntry(subkey=subkey, value=bytes(value), expires_at_s=max(network.now_s() + ttl_s, earliest_s))
        self._last_expiry_s[key, subkey] = entry.expires_at_s
        if not self._transport.alive:
            return False
        holders = network.nearest(key, self._transport.peer_id)
        return sum(holder.dht.offer(key, entry) for holder in holders) > 0  # all of them, so not any()

    async def get(self, key: str) -> list[DhtEntry]:
        await self._lookup_delay()
        if not self._transport.alive:
            return []
        best: dict[str, DhtEntry] = {}
        for holder in self._transport.network.nearest(key, self._transport.peer_id):
            for entry in holder.dht.table.get(key, {}).values():
                known = best.get(entry.subkey)
                if self._valid(key, entry) and (known is None or known.expires_at_s < entry.expires_at_s):
                    best[entry.subkey] = entry
        return list(best.values())

    def offer(self, key: str, entry: DhtEntry) -> bool:
        """Keep a record that another peer (or this one) sends, if it is valid and newer than ours."""
        if not self._valid(key, entry):
            return False
        now_s = self._transport.network.now_s()
        records = {name: old for name, old in self.table.get(key, {}).items() if old.expires_at_s > now_s}
        known = records.get(entry.subkey)
        if known is not None and known.expires_at_s >= entry.expires_at_s:
            return False
        records[entry.subkey] = entry
        self.table[key] = records
        return True

    def _valid(self, key: str, entry: DhtEntry) -> bool:
        now_s = self._transport.network.now_s()
        return is_admissible(self._validator, key, entry.subkey, entry.value, entry.expires_at_s, now_s)

    async def _lookup_delay(self) -> None:
        await asyncio.sleep(2 * self._transport.network.default_link.latency_s)


class MemoryTransport(Transport):
    """One peer of a `MemoryNetwork`.

    Args:
        network: the network it joins on entering.
        peer_id: its id; taken at its word.
        validator: checks DHT records; none keeps all.
    """

    dht: MemoryDht

    def __init__(self, network: MemoryNetwork, peer_id: PeerId, *, validator: Validator | None = None) -> None:
        self.network = network
        self.peer_id = peer_id
        self.position = _position(peer_id)
        self.traffic = Traffic()
        self.dht = MemoryDht(self, validator)
        self.incoming = Incoming()
        self.alive = False

    async def addresses(self) -> list[str]:
        return [f"/memory/{self.position >> 192}/p2p/{self.peer_id}"]

    def handle(self, protocol: str, handler: Handler) -> None:
        self.incoming.handlers[protocol] = handler

    async def connect(self, address: str) -> PeerId:
        match address.split("/"):
            case ["", "memory", number, "p2p", peer] if number.isdecimal() and peer:
                pass
            case _:
                raise UserError(f"{address[:100]!a} is not an address; use one like /memory/<number>/p2p/<peer id>")
        other = self._reach(PeerId(peer))
        if number != str(other.position >> 192):
            raise PeerUnreachableError(f"nobody answers at {address}")
        await asyncio.sleep(2 * self.network.link(self.peer_id, other.peer_id).latency_s)
        return other.peer_id

    async def open(self, peer: PeerId, protocol: str, *, timeout_s: float = 10.0) -> Stream:
        try:
            async with asyncio.timeout(timeout_s):
                await self._round_trip(peer)
        except TimeoutError:
            raise DeadlineError(f"no stream to {peer} within {timeout_s:g} s") from None
        other = self._reach(peer)
        if protocol not in other.incoming.handlers:
            raise PeerUnreachableError(f"{peer} does not speak {protocol}")
        near, far = self.network.wire_streams(self, other)
        other.incoming.accept(protocol, far)
        return near

    async def learn(self, peer: PeerId, addresses: list[str]) -> None:
        """Nothing to do: every peer of the network can be opened by its id."""

    def _reach(self, peer: PeerId) -> MemoryTransport:
        other = self.network.transports.get(peer)
        if not self.alive or other is None or other is self:
            raise PeerUnreachableError(f"{peer} is not reachable")
        return other

    async def _round_trip(self, peer: PeerId) -> None:
        while not self.network.connected(self.peer_id, peer):
            await self.network.repartitioned.wait()  # a dial's packets are sent again until one gets through
        await asyncio.sleep(2 * self.network.link(self.peer_id, peer).latency_s)

    async def __aenter__(self) -> Self:
        if self.peer_id in self.network.transports:
            raise UserError(f"peer {self.peer_id} is already running; stop it first")
        self.network.transports[self.peer_id] = self
        self.alive = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.alive = False
        if self.network.transports.get(self.peer_id) is self:
            del self.network.transports[self.peer_id]
        await self.incoming.close()
        await self.network.close_streams(self.peer_id)
