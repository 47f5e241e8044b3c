"""The in-process network: the same interface as the real one, in virtual time and under the test's control.

A `MemoryNetwork` holds any number of `MemoryTransport`s. Links have latency, bandwidth and loss, fixed or drawn at random
(protocol/memory_links.py); peers crash; the network splits and heals. On a `VirtualTimeLoop` a run is exactly repeatable for a
seed. What is modelled after the real network:

- A partition does not reset streams: nothing arrives until it heals, and after KEEPALIVE_S the streams across it break.
- Opening a stream takes one round trip, and hangs until its deadline across a partition.
- The record table is spread over the peers (protocol/memory_dht.py).
"""

from __future__ import annotations

import asyncio
import random
import time
from itertools import islice
from types import TracebackType
from typing import Self

from protocol.dht_rules import Validator
from protocol.errors import DeadlineError, PeerUnreachableError, UserError
from protocol.ids import PeerId
from protocol.incoming import Incoming
from protocol.memory_dht import NUM_REPLICAS, Holder, Keyspace, MemoryDht, position_of
from protocol.memory_links import Chance, CountedWire, Counts, LinkTable, draw_latency_s
from protocol.memory_stream import LinkSpec, MemoryStream, Pipe
from protocol.transport import Handler, Stream, Traffic, Transport
from protocol.virtual_time import VirtualTimeLoop, run_virtual

__all__ = ["LinkSpec", "MemoryDht", "MemoryNetwork", "MemoryTransport", "Validator", "run_virtual"]

KEEPALIVE_S = 30.0
_PRUNE_EVERY_ENDS = 32
_MIN_WIRES = 4096
VIRTUAL_EPOCH_S = 1.7e9


class MemoryNetwork:
    """The wires, the clock and the chance between `MemoryTransport`s.

    Args:
        seed: of the losses and of all that links draw at random.
        link: how every path behaves that neither `links` nor `set_link` names; DHT look-ups take its latency.
        links: how the paths behave, each direction apart; None for all alike.
    """

    def __init__(self, *, seed: int = 0, link: LinkSpec | None = None, links: LinkTable | None = None) -> None:
        self.transports: dict[PeerId, MemoryTransport] = {}
        self.keyspace = Keyspace()
        self._holders: dict[str, list[Holder]] = {}
        """What `nearest` has found since anybody came or went; not used while the network is split."""
        self._random = random.Random(seed)
        self._chance = Chance(seed)
        self.default_link = link or LinkSpec()
        self._table = links
        self._links: dict[frozenset[PeerId], LinkSpec] = {}
        self._wires: dict[tuple[PeerId, PeerId], CountedWire] = {}
        self._prune_wires_above = _MIN_WIRES
        self._groups: dict[PeerId, int] = {}
        self._splits = 0
        self.repartitioned = asyncio.Event()
        """Set, and replaced by a new one, whenever a partition begins or ends."""
        self._streams: dict[PeerId, dict[MemoryStream, PeerId]] = {}
        """Per peer both ends of each of its streams, in order of opening, and whose each end is."""

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
        """How the path from `a` to `b` behaves now."""
        named = self._links.get(frozenset((a, b))) if self._links else None
        if named is not None:
            return named
        return self.default_link if self._table is None else self._table(a, b)

    def round_trip_s(self, a: PeerId, b: PeerId) -> float:
        """Time that a message from `a` to `b` and its answer take now."""
        now_s = asyncio.get_running_loop().time()
        ways = ((a, b), (b, a))
        return sum(draw_latency_s(self.link(*ends), self._chance, "trip", ends, now_s) for ends in ways)

    def dht_hop_s(self, peer: PeerId, *what: object) -> float:
        """Time that `peer` waits for one answer from nobody in particular; `what` tells it from its other waits now."""
        now_s = asyncio.get_running_loop().time()
        return 2.0 * draw_latency_s(self.default_link, self._chance, "dht", peer, now_s, *what)

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
        transport = self.transports[peer]
        self.remove(transport)
        transport.dht.table.clear()
        transport.incoming.cancel()
        for stream in self._streams.pop(peer, {}):
            stream.reset()

    def add(self, transport: MemoryTransport) -> None:
        """Let a peer take part."""
        self.transports[transport.peer_id] = transport
        self.keyspace.add(transport)
        self._holders.clear()
        transport.alive = True

    def remove(self, transport: MemoryTransport) -> None:
        """The opposite of `add`; nothing happens to a peer that is not there, or not any more."""
        transport.alive = False
        if self.transports.get(transport.peer_id) is transport:
            del self.transports[transport.peer_id]
            self.keyspace.remove(transport)
            self._holders.clear()

    def connected(self, a: PeerId, b: PeerId) -> bool:
        """Whether bytes flow between the two, as far as partitions go."""
        return self._groups.get(a, 0) == self._groups.get(b, 0)

    def nearest(self, key: str, asker: PeerId) -> list[Holder]:
        """The live peers that hold records under `key`, as far as `asker` reaches them."""
        if self._groups:
            near = self.keyspace.nearest(position_of(key))
            return list(islice((other for other in near if self.connected(asker, other.peer_id)), NUM_REPLICAS))
        holders = self._holders.get(key)
        if holders is None:
            holders = self._holders[key] = list(islice(self.keyspace.nearest(position_of(key)), NUM_REPLICAS))
        return holders

    def wire_streams(self, caller: MemoryTransport, callee: MemoryTransport) -> tuple[MemoryStream, MemoryStream]:
        """Make the two ends of a new stream."""
        here, there = caller.peer_id, callee.peer_id

        def blocked() -> bool:
            return not self.connected(here, there)

        wire, writes = self._wire(here, there), {here: 0, there: 0}
        spared = wire.spared_writes(asyncio.get_running_loop().time())

        def breaks(writer: PeerId) -> bool:
            writes[writer] += 1
            loss = wire.spec.loss
            return min(writes.values()) > spared or (loss > 0.0 and self._random.random() < loss)

        out, back = Pipe(wire, blocked=blocked), Pipe(self._wire(there, here), blocked=blocked)
        near = MemoryStream(
            peer=there, outgoing=out, incoming=back, traffic=caller.traffic, breaks=lambda: breaks(here)
        )
        far = MemoryStream(peer=here, outgoing=back, incoming=out, traffic=callee.traffic, breaks=lambda: breaks(there))
        for peer in (here, there):
            self._remember(peer, {near: here, far: there})
        if len(self._wires) > self._prune_wires_above:
            self._prune_wires()
        return near, far

    async def close_streams(self, peer: PeerId) -> None:
        """Close this peer's ends in an orderly way: what it wrote before still arrives."""
        for stream, owner in self._streams.pop(peer, {}).items():
            if owner == peer:
                await stream.close()

    def _remember(self, peer: PeerId, ends: dict[MemoryStream, PeerId]) -> None:
        streams = self._streams.setdefault(peer, {})
        streams |= ends
        if len(streams) % _PRUNE_EVERY_ENDS == 0:
            self._streams[peer] = {stream: owner for stream, owner in streams.items() if not stream.is_over}

    def _wire(self, source: PeerId, target: PeerId) -> CountedWire:
        wire = self._wires.get((source, target))
        if wire is None:
            counts, spec = self.transports[source].counts, self.link(source, target)
            wire = CountedWire(spec, ends=(source, target), chance=self._chance, counts=counts)
            self._wires[source, target] = wire
        return wire

    def _prune_wires(self) -> None:
        """Forget those that no stream uses and nothing travels on: a new one will be as good."""
        now_s = asyncio.get_running_loop().time()
        ends = (pair for streams in self._streams.values() for pair in streams.items())
        used = {(owner, stream.peer) for stream, owner in ends if not stream.is_over}
        self._wires = {pair: wire for pair, wire in self._wires.items() if pair in used or wire.busy_until_s >= now_s}
        self._prune_wires_above = max(_MIN_WIRES, 2 * len(self._wires))

    def _repartition(self) -> None:
        self.repartitioned.set()
        self.repartitioned = asyncio.Event()
        for streams in self._streams.values():
            for stream in streams:
                stream.pump()

    def _break_streams_across(self, split: int) -> None:
        if split != self._splits:
            return
        for streams in self._streams.values():
            for stream, owner in streams.items():
                if not self.connected(owner, stream.peer):
                    stream.reset()


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
        self.position = position_of(peer_id)
        self.traffic = Traffic()
        self.counts = Counts()
        self.dht = MemoryDht(self, validator)
        self.incoming = Incoming()
        self.alive = False

    async def addresses(self) -> list[str]:
        return [f"/memory/{self.position >> 192}/p2p/{self.peer_id}"]

    def handle(self, protocol: str, handler: Handler) -> None:
        self.incoming.handlers[protocol] = handler

    def unhandle(self, protocol: str) -> None:
        self.incoming.handlers.pop(protocol, None)

    async def connect(self, address: str) -> PeerId:
        match address.split("/"):
            case ["", "memory", number, "p2p", peer] if number.isdecimal() and peer:
                pass
            case _:
                raise UserError(f"{address[:100]!a} is not an address; use one like /memory/<number>/p2p/<peer id>")
        other = self._reach(PeerId(peer))
        if number != str(other.position >> 192):
            raise PeerUnreachableError(f"nobody answers at {address}")
        await asyncio.sleep(self.network.round_trip_s(self.peer_id, other.peer_id))
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
        self.counts.streams += 1
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
        await asyncio.sleep(self.network.round_trip_s(self.peer_id, peer))

    async def __aenter__(self) -> Self:
        if self.peer_id in self.network.transports:
            raise UserError(f"peer {self.peer_id} is already running; stop it first")
        self.network.add(self)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.network.remove(self)
        await self.incoming.close()
        await self.network.close_streams(self.peer_id)
