"""Links of the in-process network whose behaviour is drawn at random, and the counters of what went over them.

Every draw depends on the seed and on what it is for (which link, when, the how-manieth message), never on the order in which
draws are asked for. So a run is repeatable even where the order of simultaneous events is not, and changing one link leaves the
luck of all others as it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from protocol.ids import PeerId
from protocol.memory_stream import LinkSpec, Wire

__all__ = ["Chance", "CountedWire", "Counts", "LinkTable", "RandomLink", "draw_latency_s"]

LinkTable = Callable[[PeerId, PeerId], LinkSpec]
"""(source, target) → what that direction is like. Must give equal answers to equal questions."""

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLink(LinkSpec):
    """A link with a latency of its own for every message, that may drop whole streams."""

    latency_ratio: float = 0.0
    """Standard deviation over mean of the log-normal latency of a message; `latency_s` is the mean. Order within a stream is
    kept: a message that would overtake another arrives with it, as over TCP."""
    stream_loss: float = 0.0
    """Probability, per stream, that it is reset as soon as both ends have written more than `spared_writes` times."""
    spared_writes: int = 0
    """Writes of each end that a doomed stream still carries."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """What one peer has asked of the network since it was started."""

    messages: int = 0
    """Pieces of at most 256 KiB handed to the network by this peer's streams."""
    streams: int = 0
    """Streams opened by this peer."""
    dht_gets: int = 0
    dht_stores: int = 0
    dht_hops: int = 0
    """Round trips of those gets and stores, one after another."""


class Chance:
    """Random numbers by name.

    Args:
        seed: two of the same seed agree on every number.
    """

    def __init__(self, seed: int) -> None:
        self._key = hashlib.sha256(str(seed).encode()).digest()

    def uniform(self, *what: object) -> float:
        """A number in (0, 1) that belongs to `what`, told apart by its `repr`."""
        digest = hashlib.blake2b(repr(what).encode(), digest_size=8, key=self._key).digest()
        return ((int.from_bytes(digest) >> 12) + 0.5) / 2.0**52

    def log_normal(self, mean: float, ratio: float, *what: object) -> float:
        """A log-normal number with this mean and standard deviation `ratio`·mean: exp(μ + σz), σ² = ln(1 + ratio²)."""
        if ratio <= 0.0:
            return mean
        variance = math.log1p(ratio * ratio)
        return mean * math.exp(math.sqrt(variance) * _NORMAL.inv_cdf(self.uniform(*what)) - variance / 2.0)


def draw_latency_s(link: LinkSpec, chance: Chance, *what: object) -> float:
    """The latency of one message on `link`; `what` tells it from all other messages."""
    if not isinstance(link, RandomLink):
        return link.latency_s
    return chance.log_normal(link.latency_s, link.latency_ratio, *what)


class CountedWire(Wire):
    """One direction of a link, counting its messages, and drawing their latency where the link asks for that.

    Args:
        spec: the link.
        ends: (source, target).
        chance: the network's luck.
        counts: the source's counters.
    """

    def __init__(self, spec: LinkSpec, *, ends: tuple[PeerId, PeerId], chance: Chance, counts: Counts) -> None:
        super().__init__(spec)
        self._ends, self._chance, self._counts = ends, chance, counts
        self._num_sent = 0
        self.busy_until_s = -math.inf
        """Loop time at which the last of what was handed over will have arrived."""

    def arrival_s(self, num_bytes: int, now_s: float) -> float:
        """Loop time at which `num_bytes` handed over now will have arrived; 0 bytes is the end of a stream."""
        self._num_sent += 1
        if num_bytes:
            self._counts.messages += 1
        latency_s = draw_latency_s(self.spec, self._chance, self._ends, now_s, self._num_sent)
        arrival_s = super().arrival_s(num_bytes, now_s) + latency_s - self.spec.latency_s
        self.busy_until_s = max(self.busy_until_s, arrival_s)
        return arrival_s

    def spared_writes(self, now_s: float) -> float:
        """Writes of each end that a stream opened now carries before it is reset; infinitely many for most."""
        spec = self.spec
        if not isinstance(spec, RandomLink) or self._chance.uniform("doom", self._ends, now_s) >= spec.stream_loss:
            return math.inf
        return spec.spared_writes
