"""Who takes part in a run: signed peer records in the DHT, split over buckets so that no value grows with the swarm.

A record lives under `<run>/peers/<level>/<bucket>`, subkey its peer id. At level ℓ there are 2^ℓ buckets; a peer's is the
first ℓ bits of SHA-256 of its id. Every peer picks the level at which its own bucket holds some 32 records, publishes at ℓ and
ℓ + 1 and reads buckets at ℓ and ℓ + 1, so that peers whose estimates differ by one level still see each other. A small swarm is
one bucket. The first look, every look that finds nobody, and now and then another, reads the own bucket at all levels: that is how
newcomers and islands find the rest of the swarm, in a number of look-ups that is logarithmic in its size.

Whether a peer is alive is judged by our own clock: its `sequence` must have grown within `ttl_s`. Records stay in the DHT
for a minute longer, because expiry there compares two machines' clocks, which may be a minute apart. Peers that are gone
are remembered as long as there is room, so that nobody revives them by storing their last record again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from protocol.errors import ProtocolError, TransportError
from protocol.identity import SIGNATURE_BYTES, Identity, verify
from protocol.ids import PeerId, RunId
from protocol.records import MAX_RECORD_BYTES, PeerRecord
from protocol.transport import Dht, DhtEntry
from protocol.wire import decode_message, encode_message

__all__ = [
    "BUCKET_RECORDS",
    "DEPARTED_S",
    "MAX_EXPIRY_S",
    "MAX_LIFE_S",
    "Directory",
    "SwarmView",
    "bucket_key",
    "pack_record",
    "unpack_record",
    "validate_entry",
]

logger = logging.getLogger(__name__)

BUCKET_RECORDS = 32
"""Number of records that a bucket should hold at most, before peers go up a level."""
MAX_EXPIRY_S = 600.0
"""No entry may expire later than this from now, by the clock of whoever checks it."""
MAX_LIFE_S = 120.0
"""No record may expire later than this after it was sent, by its sender's clock."""
DEPARTED_S = 600.0
"""How long those who are gone are of interest."""
_CLOCK_SKEW_S = 60.0
_MAX_LEVEL = 16
_PROBE_LOOKS = 20
"""Every so many looks all levels are read."""
_MAX_SIGHTINGS = 2048
"""Peers kept in memory. The longest gone are forgotten first; when all are alive, further strangers are ignored."""
_DOMAIN = "record"
_KEY = re.compile(r"([0-9a-f]{64})/peers/(0|[1-9][0-9]?)/(0|[1-9][0-9]{0,5})")


def pack_record(record: PeerRecord, identity: Identity) -> bytes:
    """The signed bytes of our own record: 64 bytes of signature, then the record as a msgpack map."""
    assert record.peer == identity.peer_id
    body = encode_message(record)
    data = identity.sign(_DOMAIN, body) + body
    assert len(data) <= MAX_RECORD_BYTES
    return data


def unpack_record(data: bytes, *, run: RunId | None) -> PeerRecord:
    """Read a stranger's record and check that the peer it describes has signed it.

    Args:
        data: what `pack_record` made, or anything else.
        run: the run it must belong to; None for any.

    Raises:
        ProtocolError: too long, malformed, of another run, or not signed by that peer.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise ProtocolError(f"record longer than {MAX_RECORD_BYTES} bytes")
    signature, body = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
    record = decode_message(body, PeerRecord)
    if run is not None and record.run != run:
        raise ProtocolError("record of another run")
    if not verify(PeerId(record.peer), _DOMAIN, body, signature):
        raise ProtocolError("record not signed by the peer it describes")
    return record


def bucket_key(run: RunId, level: int, digest: bytes) -> str:
    """The DHT key of the bucket that `digest`'s first `level` bits name."""
    return f"{run}/peers/{level}/{int.from_bytes(digest[:8]) >> (64 - level)}"


def validate_entry(key: str, subkey: str, value: bytes, expires_at_s: float, now_s: float) -> bool:
    """Whether a DHT node should keep, and a reader believe, this entry. Never raises, whatever a stranger sends.

    The expiry is not signed, and the entry that expires last wins; so it may not lie further ahead of the record's own time
    than an honest peer puts it. Otherwise a stranger could store a peer's old record again, to outlast its new ones.

    Args:
        expires_at_s: Unix time at which the entry says it ends.
        now_s: Unix time now.
    """
    place = _KEY.fullmatch(key)
    if place is None or len(value) > MAX_RECORD_BYTES or not math.isfinite(expires_at_s):
        return False
    run, level = RunId(place[1]), int(place[2])
    if expires_at_s > now_s + MAX_EXPIRY_S or level > _MAX_LEVEL + 1 or key != bucket_key(run, level, _digest(subkey)):
        return False
    try:
        record = unpack_record(value, run=run)
    except ProtocolError:
        return False
    return record.peer == subkey and expires_at_s <= record.sent_at_s + MAX_LIFE_S


def _digest(peer: str) -> bytes:
    return hashlib.sha256(peer.encode(errors="surrogatepass")).digest()


@dataclass(slots=True)
class _Sighting:
    record: PeerRecord
    value: bytes
    grown_at_s: float
    """Loop time at which its sequence was last seen to grow."""
    near_at_s: float = -math.inf
    """Loop time at which it was last found in a bucket of ours."""


class SwarmView(ABC):
    """What most parts of a peer need of the directory: who is there."""

    @property
    @abstractmethod
    def peers(self) -> Mapping[PeerId, PeerRecord]:
        """The newest record of every other peer that is alive and not leaving."""

    @abstractmethod
    async def refresh(self, *, extra: bytes | None = None) -> Mapping[PeerId, PeerRecord]:
        """Look again; returns the new `peers`. See `Directory.refresh`."""


class Directory(SwarmView):
    """One peer's view of the swarm.

    Args:
        dht: the table that all peers of the run share.
        identity: signs our own record.
        run: the run that this is about.
        ttl_s: a peer counts as gone this long after its record last changed; at most a minute.
    """

    def __init__(self, *, dht: Dht, identity: Identity, run: RunId, ttl_s: float = 45.0) -> None:
        assert ttl_s + _CLOCK_SKEW_S <= MAX_LIFE_S
        self.level = 0
        self.num_failed_reads = 0
        """Look-ups that the network failed; the view then lives on what it knew."""
        self._dht, self._identity, self._run, self._ttl_s = dht, identity, run, ttl_s
        self._own: PeerRecord | None = None
        self._own_digest = _digest(identity.peer_id)
        self._alive: dict[PeerId, PeerRecord] = {}
        self._sightings: dict[PeerId, _Sighting] = {}
        self._sees_others = False
        self._num_looks = 0

    @property
    def all_records(self) -> Mapping[PeerId, PeerRecord]:
        """The newest record of every peer that is alive or has just said goodbye, our own included once published."""
        own = {} if self._own is None else {self._identity.peer_id: self._own}
        return own | self._alive

    @property
    def peers(self) -> Mapping[PeerId, PeerRecord]:
        """The newest record of every other peer that is alive and not leaving."""
        return {peer: record for peer, record in self._alive.items() if record.state != "leaving"}

    @property
    def neighbours(self) -> Mapping[PeerId, PeerRecord]:
        """Of `peers`, those who share a bucket with us, and so see us, too. What has to be mutual, as a pipeline has, is made of
        them: whom a look into another bucket has shown knows nothing of us."""
        now_s = asyncio.get_running_loop().time()
        near = {peer for peer, seen in self._sightings.items() if now_s - seen.near_at_s <= self._ttl_s}
        return {peer: record for peer, record in self.peers.items() if peer in near}

    @property
    def neighbourhood(self) -> Mapping[PeerId, PeerRecord]:
        """The neighbours and, once published, ourselves."""
        own = {} if self._own is None else {self._identity.peer_id: self._own}
        return own | dict(self.neighbours)

    @property
    def departed(self) -> Mapping[PeerId, PeerRecord]:
        """The last record of every peer that was there within DEPARTED_S and is not in `peers` any more."""
        now_s, there = asyncio.get_running_loop().time(), self.peers
        return {
            peer: sighting.record
            for peer, sighting in self._sightings.items()
            if now_s - sighting.grown_at_s <= DEPARTED_S and peer not in there
        }

    async def publish(self, record: PeerRecord) -> bool:
        """Tell the swarm about ourselves; True if any node took it. A network failure is a False, not an error."""
        assert record.run == self._run
        value = pack_record(record, self._identity)
        self._own = record
        async with asyncio.TaskGroup() as group:
            stores = [group.create_task(self._store(level, value)) for level in (self.level, self.level + 1)]
        return any(store.result() for store in stores)

    async def refresh(self, *, extra: bytes | None = None) -> Mapping[PeerId, PeerRecord]:
        """Read the directory and return the new view, which `peers` shows from then on.

        Args:
            extra: a hash (≥ 8 bytes) that names one more bucket to read, so that a large swarm mixes; usually PRF(round).

        Network failures are counted in `num_failed_reads` and never raised. Cancelled, it leaves the old view.
        """
        probing = not self._sees_others or self._num_looks % _PROBE_LOOKS == 0
        levels = range(_MAX_LEVEL + 1) if probing else range(self.level, self.level + 2)
        own = {level: bucket_key(self._run, level, self._own_digest) for level in levels}
        keys = set(own.values())
        if extra is not None:
            keys |= {bucket_key(self._run, level, extra) for level in (self.level, self.level + 1)}
        async with asyncio.TaskGroup() as group:
            reads = {key: group.create_task(self._read(key)) for key in keys}
        now_s = asyncio.get_running_loop().time()
        found = {key: self._take_in(read.result(), now_s) for key, read in reads.items()}
        self._alive = {
            peer: sighting.record
            for peer, sighting in self._sightings.items()
            if now_s - sighting.grown_at_s <= self._ttl_s
        }
        self._num_looks += 1
        self._adapt_level({level: len(found[key] & self._alive.keys()) for level, key in own.items()})
        for level in {self.level, self.level + 1} & own.keys():
            for entry in reads[own[level]].result():
                seen = self._sightings.get(PeerId(entry.subkey))
                if (
                    seen is not None and seen.value == entry.value
                ):  # else it is left over from another level of that peer's
                    seen.near_at_s = now_s
        return self.peers

    async def _store(self, level: int, value: bytes) -> bool:
        key = bucket_key(self._run, level, self._own_digest)
        try:
            return await self._dht.store(key, self._identity.peer_id, value, ttl_s=self._ttl_s + _CLOCK_SKEW_S)
        except TransportError as error:
            logger.debug("could not publish the record: %s", error)
            return False

    async def _read(self, key: str) -> list[DhtEntry]:
        try:
            return await self._dht.get(key)
        except TransportError as error:
            self.num_failed_reads += 1
            logger.debug("could not read the directory: %s", error)
            return []

    def _take_in(self, entries: list[DhtEntry], now_s: float) -> set[PeerId]:
        """Bring the sightings up to date with one bucket; returns the other peers in it."""
        found = set()
        for entry in entries:
            peer = PeerId(entry.subkey)
            known = self._sightings.get(peer)
            if peer == self._identity.peer_id:
                continue
            if known is None or known.value != entry.value:
                try:
                    record = unpack_record(entry.value, run=self._run)
                except ProtocolError as error:
                    logger.warning("bad record in the directory: %s", error.reason)
                    continue
                if record.peer != peer or not (known or self._make_room(now_s)):
                    continue
                if known is None:
                    self._sightings[peer] = _Sighting(record, entry.value, now_s)
                elif record.sequence > known.record.sequence:
                    known.record, known.value, known.grown_at_s = record, entry.value, now_s
            found.add(peer)
        return found

    def _make_room(self, now_s: float) -> bool:
        if len(self._sightings) < _MAX_SIGHTINGS:
            return True
        oldest = min(self._sightings, key=lambda peer: self._sightings[peer].grown_at_s)
        if now_s - self._sightings[oldest].grown_at_s <= self._ttl_s:
            return False
        del self._sightings[oldest]
        return True

    def _adapt_level(self, num_others: Mapping[int, int]) -> None:
        """Choose the level from the number of other live peers in our bucket at each level read.

        Most peers are found at the level that most peers use (one further up the bucket is half as full), so that is the
        bucket to judge the swarm's size by, and a handful of strangers at a high level can not lure us there. Going down
        waits until the bucket is a quarter full, so that a swarm of about 32·2^ℓ does not go up and down.
        """
        self._sees_others = any(num_others.values())
        fullest = max(num_others, key=lambda level: (num_others[level], -level))
        num_records = num_others[fullest] + 1
        wanted = max(0, min(_MAX_LEVEL, fullest + math.ceil(math.log2(num_records / BUCKET_RECORDS))))
        is_settled = fullest in (self.level, self.level + 1) and num_records >= BUCKET_RECORDS / 4
        if wanted > self.level or not is_settled:
            self.level = wanted
