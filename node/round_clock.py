"""Which round a peer works on, without a coordinator and without a common clock.

A round number is a label: partners must carry nearly the same one, and Δ is weighted by tokens. So a peer that fell behind
takes over the swarm's number, and a peer that is faster than the others stretches its round by more steps until they have
caught up, instead of running away from everybody. "The swarm's number" is the median of all live trainers, this one
included: it takes half of them to move it, and no claim moves it by more than MAX_SKIP at once. Peers whose records have
stopped growing are not waited for; they may be dead, though their records live on for a while.

Within a round a peer may be as late as to find everybody gone, and with equal speeds it would be so in all further rounds: of
three, two would average with each other for ever. `is_behind` tells it when the others end theirs, so that it can end with them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from protocol.ids import PeerId
from protocol.records import PeerRecord

__all__ = ["MAX_SKIP", "MAX_STRETCH", "RoundClock"]

MAX_SKIP = 64
"""Rounds a peer skips at once, at most."""
MAX_STRETCH = 16
"""A round has at most this many times the run's inner steps."""
FRESH_S = 12.0
"""A peer counts while its record has been renewed within this time: four heartbeats."""


class RoundClock:
    """Watches the others' rounds.

    Args:
        total_rounds: the run's length; 0 for a run without end.
    """

    def __init__(self, *, total_rounds: int) -> None:
        self._total = total_rounds
        self._seen: dict[PeerId, tuple[int, float]] = {}
        self._rounds: list[int] = []

    def observe(self, trainers: Mapping[PeerId, PeerRecord], now_s: float) -> None:
        """Look at the live trainers' records, this peer's own not among them."""
        grown = {}
        for peer, record in trainers.items():
            sequence, since_s = self._seen.get(peer, (-1, now_s))
            grown[peer] = (record.sequence, now_s if record.sequence > sequence else since_s)
        self._seen = grown
        self._rounds = [record.round for peer, record in trainers.items() if now_s - grown[peer][1] <= FRESH_S]

    def next_round(self, own: int) -> int:
        """The number after `own`; or, when the others have finished `own` and the one after it, the number after theirs, so
        that what was done here counts for the round they are in."""
        swarm = min(self._median(own), own + MAX_SKIP)
        following = swarm + 1 if swarm >= own + 2 else own + 1
        return min(following, self._total) if self._total else following

    def is_ahead(self, own: int) -> bool:
        """Whether the others are still in earlier rounds than `own`. Ending it now would find nobody to exchange with."""
        return own > self._median(own)

    def is_behind(self, own: int) -> bool:
        """Whether most of the others have ended `own` already: they exchange now, and not much later they are gone."""
        return bool(self._rounds) and statistics.median_low(self._rounds) > own

    def _median(self, own: int) -> int:
        return int(statistics.median_low([own, *self._rounds]))
