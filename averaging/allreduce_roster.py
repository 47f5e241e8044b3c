"""Who is in the group: agreement without a coordinator, as a pure state machine.

Everybody sends everybody the group that it sees (a Ballot). When all ballots are alike, that is the group: the usual case, one
message. Otherwise the next ballot names whoever at least half of the ballots named. A majority rather than the intersection: one
peer that does not see another, or does not want to, must not be able to throw it out. A member that some others can
not reach does no harm, since every later step does without what is missing.

After the last ballot a peer goes on if at least half of the ballots are like its own, and counts the others as missing.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from averaging.allreduce_messages import MAX_BALLOTS, MAX_MEMBERS, Ballot
from protocol.errors import ProtocolError
from protocol.ids import PeerId, RunId
from protocol.wire import pack

__all__ = ["Ballots", "Roster", "Tally", "group_of", "roster_digest"]

Roster = tuple[PeerId, ...]
"""The members of a group, sorted; the index of a member is the index of its part."""


def group_of(me: PeerId, candidates: Iterable[PeerId], *, run: RunId, round: int) -> list[PeerId]:
    """The candidates of this round's group, ourselves not counted.

    Up to `MAX_MEMBERS` peers are one group. More are dealt out by the first bits of a hash that is new every round, so that
    progress mixes; everybody deals alike as long as all see about as many peers.
    """
    everybody = {me, *candidates}
    num_bits = 0
    if len(everybody) > MAX_MEMBERS:
        num_bits = math.ceil(
            math.log2(len(everybody) / (MAX_MEMBERS // 2))
        )  # on average 16 to 32 in a group of at most 64

    def lot(peer: PeerId) -> int:
        return int.from_bytes(hashlib.sha256(f"llm-node:allreduce\0{round}\0{peer}\0{run}".encode()).digest())

    shift = 256 - num_bits
    group = sorted((peer for peer in everybody if lot(peer) >> shift == lot(me) >> shift), key=lot)[:MAX_MEMBERS]
    return [peer for peer in group if peer != me] if me in group else []  # crowded out: practically never


def roster_digest(roster: Roster, *, run: RunId, round: int) -> bytes:
    """32 bytes that name this group in this round of this run."""
    return hashlib.sha256(pack([run, round, *roster])).digest()


@dataclass(frozen=True, slots=True)
class Tally:
    """What the ballots of one number say.

    Args:
        kind: agreed: `roster` is the group. again: `roster` is to be the next ballot. failed: no group, go on alone.
        roster: see there.
    """

    kind: Literal["agreed", "again", "failed"]
    roster: Roster


class Ballots:
    """The ballots of one round, from everybody else.

    Args:
        me: ourselves.
        known: our candidates. Somebody else needs more than half of the ballots, so that half of them can not invent peers.
    """

    def __init__(self, me: PeerId, known: Collection[PeerId]) -> None:
        self._me = me
        self._known = frozenset(known) | {me}
        self._votes: dict[PeerId, list[Roster]] = {}
        self._settled: set[PeerId] = set()

    def hear(self, peer: PeerId, ballot: Ballot) -> None:
        """Take a ballot.

        Raises:
            ProtocolError: out of order, unsorted, or without its sender.
        """
        votes = self._votes.setdefault(peer, [])
        members = [PeerId(member) for member in ballot.members]
        if ballot.number != len(votes):
            raise ProtocolError("ballot out of order", peer=peer)
        if members != sorted(set(members)):
            raise ProtocolError("ballot with unsorted members", peer=peer)
        if peer not in members:
            raise ProtocolError("ballot without its sender", peer=peer)
        votes.append(tuple(members))

    def settle(self, peer: PeerId) -> None:
        """The peer votes no more; its last ballot stands for all later numbers.

        Raises:
            ProtocolError: it has never voted.
        """
        if not self._votes.get(peer):
            raise ProtocolError("part before any ballot", peer=peer)
        self._settled.add(peer)

    def forget(self, peer: PeerId) -> None:
        """The peer is gone."""
        self._votes.pop(peer, None)

    def has(self, peer: PeerId, number: int) -> bool:
        """Whether the peer's word on ballot `number` is known."""
        return len(self._votes.get(peer, ())) > number or peer in self._settled

    def count(self, number: int, own: Roster) -> Tally:
        """What follows from all ballots of this number that have come in, and our own."""
        others = [votes[min(number, len(votes) - 1)] for peer, votes in self._votes.items() if self.has(peer, number)]
        ballots = [own, *others]
        num_alike = ballots.count(own)
        if num_alike == len(ballots):
            return Tally("agreed", own)
        if number == MAX_BALLOTS - 1:
            return Tally("agreed" if 2 * num_alike >= len(ballots) else "failed", own)
        named = Counter(member for ballot in ballots for member in ballot)
        roster = tuple(sorted(member for member, times in named.items() if self._is_in(member, times, len(ballots))))
        return Tally("again" if self._me in roster and len(roster) <= MAX_MEMBERS else "failed", roster)

    def _is_in(self, member: PeerId, times: int, num_ballots: int) -> bool:
        return 2 * times >= num_ballots if member in self._known else 2 * times > num_ballots
