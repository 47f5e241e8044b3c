"""Who holds which mean, who lied, and whom to ask."""

from __future__ import annotations

import hashlib

import pytest

from averaging.allreduce_ledger import Ledger
from averaging.allreduce_messages import Echo, Mean, Share
from protocol.errors import ProtocolError
from protocol.identity import Identity
from protocol.ids import PeerId
from tests.averaging.swarm import RUN, identities

KEYS: list[Identity] = sorted(identities(4), key=lambda identity: identity.peer_id)
ROSTER = tuple(key.peer_id for key in KEYS)


def ledger_of(index: int, *, round: int = 3, roster: tuple[PeerId, ...] = ROSTER) -> Ledger:
    return Ledger(KEYS[index], run=RUN, round=round, roster=roster)


def mean_of(index: int, text: str = "mean", *, shares: list[int] | None = None, round: int = 3) -> Mean:
    digest = hashlib.sha256(f"{text}{index}".encode()).digest()
    return ledger_of(index, round=round).sign(digest, shares or [Share.COUNTED] * 4)


def full_ledger() -> Ledger:
    """Peer 0, holding everything."""
    ledger = ledger_of(0)
    ledger.sign(mean_of(0).digest, [Share.COUNTED] * 4)
    for index in (1, 2, 3):
        ledger.hear(mean_of(index), teller=ROSTER[index])
        ledger.hold(index)
    return ledger


def test_everything_held_and_echoed_counts() -> None:
    ledger = full_ledger()
    assert ledger.is_complete
    assert not ledger.accepts(0), "nobody else is known to hold our own part"
    assert ledger.reason(0) == "nobody else holds it"
    assert ledger.hear_echo(ledger.echo(), teller=ROSTER[1]) == []
    assert all(ledger.accepts(part) for part in range(4))
    assert ledger.contributors() == set(ROSTER)
    assert ledger.wants(set(ROSTER)) == {}


def test_an_owner_who_tells_two_stories_loses_its_part() -> None:
    ledger = full_ledger()
    echo = Echo(means=[mean_of(0), mean_of(1), mean_of(2), mean_of(3, "another")])
    assert ledger.hear_echo(echo, teller=ROSTER[1]) == [ROSTER[3]]
    assert [ledger.accepts(part) for part in range(4)] == [True, True, True, False]
    assert "two stories" in ledger.reason(3)
    assert ledger.hear_echo(echo, teller=ROSTER[2]) == [], "convicted once"
    assert 3 not in {part for parts in ledger.wants(set(ROSTER)).values() for part in parts}


def test_other_shares_for_the_same_bytes_are_a_second_story_too() -> None:
    ledger = full_ledger()
    other = mean_of(3, shares=[Share.COUNTED, Share.ABSENT, Share.COUNTED, Share.COUNTED])
    assert ledger.hear_echo(Echo(means=[other]), teller=ROSTER[1]) == [ROSTER[3]]


def test_a_member_can_not_frame_an_owner() -> None:
    ledger = full_ledger()
    forged = mean_of(3).model_copy(update={"digest": bytes(32)})
    with pytest.raises(ProtocolError, match="forged") as caught:
        ledger.hear_echo(Echo(means=[forged]), teller=ROSTER[1])
    assert caught.value.peer == ROSTER[1]
    assert ledger.reason(0)
    assert ledger.accepts(3)


@pytest.mark.parametrize(
    "mean",
    [
        mean_of(1, round=4),
        mean_of(1).model_copy(update={"run": "00" * 32}),
        mean_of(1).model_copy(update={"roster": bytes(32)}),
        mean_of(1).model_copy(update={"part": 9}),
        mean_of(1).model_copy(update={"part": 2}),
        mean_of(1).model_copy(update={"shares": b"\1"}),
        mean_of(1).model_copy(update={"signature": bytes(64)}),
    ],
)
def test_a_mean_of_another_group_or_hand_is_a_violation(mean: Mean) -> None:
    ledger = ledger_of(0)
    with pytest.raises(ProtocolError) as caught:
        ledger.hear(mean, teller=ROSTER[1])
    assert caught.value.peer == ROSTER[1]
    assert not ledger.holds(1)


def test_what_we_lack_is_asked_of_those_who_hold_it() -> None:
    ledger = ledger_of(0)
    ledger.sign(mean_of(0).digest, [Share.COUNTED] * 4)
    ledger.hear_echo(Echo(means=[mean_of(1), mean_of(3)]), teller=ROSTER[1])
    ledger.hear_echo(Echo(means=[mean_of(2), mean_of(3)]), teller=ROSTER[2])
    wants = ledger.wants({ROSTER[1], ROSTER[2]})
    assert sorted(part for parts in wants.values() for part in parts) == [1, 2, 3]
    assert 1 in wants[ROSTER[1]]
    assert 2 in wants[ROSTER[2]]
    assert ledger.wants({ROSTER[2]}) == {ROSTER[2]: [2, 3]}
    with pytest.raises(ProtocolError, match="digest"):
        ledger.check(3, bytes(32), teller=ROSTER[2])
    ledger.check(3, mean_of(3).digest, teller=ROSTER[2])
    assert ledger.reason(1) == "its mean did not arrive"


def test_an_echo_that_repeats_itself_is_a_violation() -> None:
    with pytest.raises(ProtocolError, match="twice"):
        full_ledger().hear_echo(Echo(means=[mean_of(1), mean_of(1)]), teller=ROSTER[1])


def test_who_was_left_out_is_named() -> None:
    ledger = ledger_of(0)
    shares = [Share.COUNTED, Share.CLIPPED, Share.NOT_FINITE, Share.ABSENT]
    ledger.hear(mean_of(1, shares=shares), teller=ROSTER[1])
    ledger.hold(1)
    assert ledger.contributors() == {ROSTER[0], ROSTER[1]}
    assert ledger.not_finite() == {ROSTER[2]}
