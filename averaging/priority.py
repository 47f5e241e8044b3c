"""Who meets whom in a round, as far as it is decided beforehand: every tie of two peers has a priority that both ends compute.

The matching itself (averaging/pairing.py) has to do with who is there and when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import combinations

from protocol.ids import PeerId

__all__ = ["foreseen_partner", "priority", "ranking"]

_MAX_FORESIGHT = 64
"""Peers up to which `foreseen_partner` works out the whole matching: two thousand hashes."""


def priority(beacon: bytes, round: int, a: PeerId, b: PeerId) -> int:
    """Priority of the tie between `a` and `b` in `round`: 256 bits, the same from both ends, larger is better."""
    first, second = sorted((a, b))
    text = b"llm-node:pairing\0%d\0%s\0%s\0" % (round, first.encode(), second.encode())
    return int.from_bytes(hashlib.sha256(text + beacon).digest())


def ranking(beacon: bytes, round: int, me: PeerId, candidates: Iterable[PeerId]) -> list[PeerId]:
    """The candidates, best first, as `me` sees them in `round`."""
    return sorted(set(candidates) - {me}, key=lambda peer: priority(beacon, round, me, peer), reverse=True)


def foreseen_partner(beacon: bytes, round: int, me: PeerId, candidates: Iterable[PeerId]) -> PeerId | None:
    """Whom `me` meets in `round` if everybody is there: the ties in their order, each taken that is left possible by those before.

    In large swarms it is the best candidate, which is right in more than half the cases.
    """
    peers = sorted({me, *candidates})
    if len(peers) > _MAX_FORESIGHT:
        return ranking(beacon, round, me, peers)[0]
    paired: set[PeerId] = set()
    for tie in sorted(combinations(peers, 2), key=lambda tie: priority(beacon, round, *tie), reverse=True):
        if paired.isdisjoint(tie):
            paired.update(tie)
            if me in tie:
                return tie[0] if tie[1] == me else tie[1]
    return None
