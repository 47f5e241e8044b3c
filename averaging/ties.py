"""The tie between us and one candidate during the search for a partner: its states, and the table of all that may happen to it.

`averaging.pairing.Matcher` keeps one per candidate and takes every step through this table.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["TRANSITIONS", "Event", "Tie"]


class Tie(Enum):
    """What stands between us and one candidate. Proposals *to* us are kept apart, in `Matcher.suitors`."""

    OPEN = "open"
    PROPOSED = "proposed"  # our proposal stands
    PAIRING = "pairing"  # accepted by one side, Offers under way
    MATCHED = "matched"  # both Offers are in
    DROPPED = "dropped"  # turned us down, unreachable, or out of the window; its own proposal would revive it
    BARRED = "barred"  # broke pairings off too often


class Event(Enum):
    """What can happen to a tie."""

    PROPOSE = "we propose"
    WITHDRAW = "we withdraw our proposal"
    ACCEPT = "we accept its proposal"
    ACCEPTED = "it accepts our proposal"
    OTHER_ROUND = "it is in another round, within the window"
    TURNED_DOWN = "it turned us down"
    UNREACHABLE = "our proposal got lost"
    CALLED = "it proposes to us, from a round within the window"
    CONFIRMED = "both offers are in"
    BROKE_OFF = "the pairing broke before both offers were in"
    GAVE_UP = "it broke off once too often"


TRANSITIONS: dict[tuple[Tie, Event], Tie] = {
    (Tie.OPEN, Event.PROPOSE): Tie.PROPOSED,
    (Tie.PROPOSED, Event.WITHDRAW): Tie.OPEN,
    (Tie.OPEN, Event.ACCEPT): Tie.PAIRING,
    (Tie.PROPOSED, Event.ACCEPTED): Tie.PAIRING,
    (Tie.PROPOSED, Event.OTHER_ROUND): Tie.OPEN,
    (Tie.PROPOSED, Event.TURNED_DOWN): Tie.DROPPED,
    (Tie.PROPOSED, Event.UNREACHABLE): Tie.DROPPED,
    (Tie.OPEN, Event.CALLED): Tie.OPEN,
    (Tie.PROPOSED, Event.CALLED): Tie.PROPOSED,
    (Tie.PAIRING, Event.CALLED): Tie.PAIRING,
    (Tie.MATCHED, Event.CALLED): Tie.MATCHED,
    (Tie.DROPPED, Event.CALLED): Tie.OPEN,
    (Tie.BARRED, Event.CALLED): Tie.BARRED,
    (Tie.PAIRING, Event.CONFIRMED): Tie.MATCHED,
    (Tie.PAIRING, Event.BROKE_OFF): Tie.OPEN,
    (Tie.PAIRING, Event.GAVE_UP): Tie.BARRED,
}
"""Everything that can happen to a tie; a missing pair is a bug of ours (a peer can not cause one)."""
