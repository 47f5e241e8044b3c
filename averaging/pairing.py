"""Who averages with whom: greedy matching on symmetric pseudo-random priorities, without a coordinator or a roster.

Every tie between two peers has a priority that both compute alike, and no two ties have the same. Each peer proposes to its
best remaining candidate. A proposal from that very candidate makes a pair; any other is held until the better candidates have
turned us down. A paired peer turns everybody else down, which lets them move on. The tie with the highest priority among
the undecided is always mutual, so somebody always makes progress, no cycle of waiting can form, the outcome is a maximal
matching, and an odd peer is turned down by all and steps alone. Nobody can choose a victim: priorities are a hash of the run,
the round and the two ids.

Rounds. The swarm is not in step: a candidate may still be at work on the round for which we want it, or be a round off.
A tie is ranked first by whether both sides are in the same round, then by the hash, taken at the later of the two rounds:
both ends agree on that as soon as they know each other's round. A proposal therefore says in which round it believes the
candidate to be, and a wrong belief is answered at once ("other-round") instead of being waited upon. Partners are at most
`max_lag_rounds` apart. Whoever is not exchanging holds proposals made for its next round: the faster waits for the slower.

Patience. A candidate that has just paired in an earlier round than ours ranks last, and so does one that lets us wait too long
(it may be slow, stopped, or itself waiting for somebody slow): we wait on only while nobody else can be had. Its own
proposal to us restores its rank, so both ends agree again as soon as it is there.

`Matcher` is pure: events in, actions out; averaging/search.py carries the actions out. What may happen to the tie with one
candidate is tabulated in averaging/ties.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from averaging.exchange_messages import RejectReason
from averaging.priority import priority
from averaging.ties import TRANSITIONS, Event, Tie
from protocol.ids import PeerId

__all__ = [
    "Accept",
    "Action",
    "Alone",
    "Matcher",
    "Phase",
    "Propose",
    "Reject",
    "Withdraw",
]

_MAX_FAILURES = 2
"""Pairings that may break before the first Offer, until a candidate is not tried again in this round."""


class Phase(Enum):
    """Where the search as a whole stands."""

    COLLECTING = "collecting"  # not begun: proposals held so far are being looked at
    SEARCHING = "searching"
    PAIRING = "pairing"
    MATCHED = "matched"
    OVER = "over"  # nobody is left, or the deadline has passed


@dataclass(frozen=True, slots=True)
class Propose:
    """Send our proposal, saying in which round we believe `peer` to be."""

    peer: PeerId
    expected_round: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Close the stream of our proposal to `peer`."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Accept:
    """Accept the proposal that we hold from `peer`."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Reject:
    """Turn down the proposal that we hold from `peer`; `round` is the one in which we (next) can pair."""

    peer: PeerId
    reason: RejectReason
    round: int


@dataclass(frozen=True, slots=True)
class Alone:
    """Nobody is left: step alone."""


Action = Propose | Withdraw | Accept | Reject | Alone


@dataclass(slots=True)
class _Candidate:
    round: int
    tie: Tie = Tie.OPEN
    expected_round: int = 0
    num_proposals: int = 0
    num_failures: int = 0
    is_sent: bool = False
    is_last_resort: bool = False
    """It must first finish a round, or has kept our proposal unanswered for long, or broke a pairing off."""


class Matcher:
    """The search for one round's partner.

    Args:
        me: ourselves.
        round: our round.
        candidates: whom we may pair with; nobody else's proposal is considered.
        beacon: shared randomness of the run.
        max_lag_rounds: largest difference of rounds between partners.
    """

    def __init__(
        self, *, me: PeerId, round: int, candidates: Iterable[PeerId], beacon: bytes, max_lag_rounds: int
    ) -> None:
        self.me = me
        self.round = round
        self.phase = Phase.COLLECTING
        self.partner: PeerId | None = None
        self.suitors: set[PeerId] = set()
        """Whose proposals we hold and could accept."""
        self._beacon = beacon
        self._max_lag_rounds = max_lag_rounds
        self._max_proposals = 2 * max_lag_rounds + 4
        self._candidates = {peer: _Candidate(round) for peer in candidates if peer != me}

    # ---- events ----

    def start(self) -> list[Action]:
        """Begin, after the proposals held so far have been fed to `called`."""
        self.phase = Phase.SEARCHING
        return self._decide()

    def called(self, peer: PeerId, round: int, expected_round: int) -> list[Action]:
        """`peer`, in its `round`, proposes to us, believing us in `expected_round`. No action means: hold it."""
        candidate = self._candidates.get(peer)
        if candidate is None:
            return [Reject(peer, "unknown", self.round)]
        if abs(round - self.round) > self._max_lag_rounds:
            return [Reject(peer, "too-far", self.round)]
        self._step(peer, Event.CALLED)
        candidate.round, candidate.is_last_resort = round, False
        if self.phase in (Phase.MATCHED, Phase.OVER):
            waits_for_next_round = round > self.round and expected_round == self.round + 1
            reason: RejectReason = "matched" if self.phase is Phase.MATCHED else "busy"
            return [] if waits_for_next_round else [Reject(peer, reason, self.round + 1)]
        if candidate.tie is Tie.BARRED:
            return [Reject(peer, "busy", self.round + 1)]
        if expected_round != self.round:
            return [Reject(peer, "other-round", self.round), *self._decide()]
        self.suitors.add(peer)
        return self._decide()

    def hung_up(self, peer: PeerId) -> list[Action]:
        """A proposal that we held is gone."""
        self.suitors.discard(peer)
        return self._decide()

    def sent(self, peer: PeerId) -> None:
        """Our proposal is on its way: from now on the smaller id sticks to its own if both propose at once."""
        self._candidates[peer].is_sent = True

    def accepted(self, peer: PeerId) -> None:
        """`peer` accepted our proposal."""
        self._step(peer, Event.ACCEPTED)
        self.phase, self.partner = Phase.PAIRING, peer

    def turned_down(self, peer: PeerId, reason: RejectReason, round: int) -> list[Action]:
        """`peer` turned our proposal down; `round` is the one in which it (next) can pair."""
        candidate = self._candidates[peer]
        can_pair_later = reason == "other-round" or (reason in ("matched", "busy") and round <= self.round)
        is_open = (
            can_pair_later
            and round != candidate.expected_round
            and abs(round - self.round) <= self._max_lag_rounds
            and candidate.num_proposals < self._max_proposals
        )
        self._step(peer, Event.OTHER_ROUND if is_open else Event.TURNED_DOWN)
        candidate.round, candidate.is_last_resort = round, reason != "other-round"
        return self._decide()

    def unreachable(self, peer: PeerId) -> list[Action]:
        """Our proposal to `peer` could not be delivered, or its stream broke, or the answer was nonsense."""
        self._step(peer, Event.UNREACHABLE)
        if peer in self.suitors:
            self._step(peer, Event.CALLED)
        return self._decide()

    def waited_long(self, peer: PeerId) -> list[Action]:
        """Our proposal to `peer` has been without an answer for longer than we like to wait."""
        self._candidates[peer].is_last_resort = True
        return self._decide()

    def confirmed(self) -> list[Action]:
        """Both Offers are in: we have a partner, and everybody else is free to go on."""
        assert self.partner is not None
        self._step(self.partner, Event.CONFIRMED)
        self.phase = Phase.MATCHED
        self.suitors.discard(self.partner)
        return self._release("matched")

    def broke_off(self) -> list[Action]:
        """The pairing failed before both Offers were in: look further."""
        assert self.partner is not None
        peer, candidate = self.partner, self._candidates[self.partner]
        candidate.num_failures += 1
        candidate.is_last_resort = True
        self._step(peer, Event.GAVE_UP if candidate.num_failures >= _MAX_FAILURES else Event.BROKE_OFF)
        self.suitors.discard(peer)
        self.phase, self.partner = Phase.SEARCHING, None
        return self._decide()

    def close(self) -> list[Action]:
        """The deadline has passed, or the exchange has ended: release whoever still waits."""
        if self.phase is not Phase.MATCHED:
            self.phase = Phase.OVER
        return self._release("busy")

    # ---- decisions ----

    def _decide(self) -> list[Action]:
        if self.phase is not Phase.SEARCHING:
            return []
        best = self._best()
        if best is None:
            self.phase = Phase.OVER
            return [Alone(), *self._release("busy")]
        candidate = self._candidates[best]
        is_standing = candidate.tie is Tie.PROPOSED
        if best not in self.suitors:
            if is_standing:
                return []
            actions = self._withdraw()
            self._step(best, Event.PROPOSE)
            candidate.expected_round, candidate.is_sent = candidate.round, False
            candidate.num_proposals += 1
            return [*actions, Propose(best, candidate.round)]
        if is_standing and candidate.is_sent and self.me < best:
            return []  # both proposed at once: the smaller id's stream is kept, and this one is ours
        actions = self._withdraw()
        self._step(best, Event.ACCEPT)
        self.phase, self.partner = Phase.PAIRING, best
        return [*actions, Accept(best)]

    def _best(self) -> PeerId | None:
        live = [peer for peer, candidate in self._candidates.items() if candidate.tie in (Tie.OPEN, Tie.PROPOSED)]
        return max(live, key=self._rank, default=None)

    def _rank(self, peer: PeerId) -> tuple[bool, bool, int]:
        candidate = self._candidates[peer]
        later = max(self.round, candidate.round)
        is_same = candidate.round == self.round
        return not candidate.is_last_resort, is_same, priority(self._beacon, later, self.me, peer)

    def _withdraw(self) -> list[Action]:
        standing = [peer for peer, candidate in self._candidates.items() if candidate.tie is Tie.PROPOSED]
        for peer in standing:
            self._step(peer, Event.WITHDRAW)
        return [Withdraw(peer) for peer in standing]

    def _release(self, reason: RejectReason) -> list[Action]:
        released, self.suitors = sorted(self.suitors), set()
        return [Reject(peer, reason, self.round + 1) for peer in released]

    def _step(self, peer: PeerId, event: Event) -> None:
        candidate = self._candidates[peer]
        assert (candidate.tie, event) in TRANSITIONS, f"local bug: {event.value} while {candidate.tie.value}"
        candidate.tie = TRANSITIONS[candidate.tie, event]
