"""Round numbers among peers of any speed, and among liars."""

from __future__ import annotations

import pytest

from node.round_clock import FRESH_S, MAX_SKIP, RoundClock
from protocol.ids import PeerId
from protocol.records import PeerRecord
from tests.protocol.samples import identity, record

PEERS = [identity(number) for number in range(1, 8)]


def records(*rounds: int, sequence: int = 1) -> dict[PeerId, PeerRecord]:
    return {
        peer.peer_id: record(peer, round=round, sequence=sequence) for peer, round in zip(PEERS, rounds, strict=False)
    }


def clock(*rounds: int, total: int = 0) -> RoundClock:
    made = RoundClock(total_rounds=total)
    made.observe(records(*rounds), 0.0)
    return made


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (5, [], 6),
        (5, [5, 6], 6),
        (5, [6, 6, 6], 6),
        (5, [9, 9, 9], 10),
        (5, [9], 6),  # one other is no majority: it is the faster that waits
        (5, [10**9], 6),
        (5, [10**9, 6, 7], 6),
        (5, [10**9] * 4, 6 + MAX_SKIP),
        (20, [3, 4, 4], 21),
    ],
)
def test_the_next_round(own: int, others: list[int], expected: int) -> None:
    assert clock(*others).next_round(own) == expected


def test_no_claim_ends_a_run() -> None:
    assert clock(10**9, total=30).next_round(1) == 2
    assert clock(30, 30, 30, total=30).next_round(1) == 30


@pytest.mark.parametrize(
    ("own", "others", "ahead"),
    [(5, [], False), (5, [5], False), (5, [4], True), (6, [3, 6], False), (6, [5, 5, 6], True), (6, [0, 6, 6], False)],
)
def test_being_ahead(own: int, others: list[int], ahead: bool) -> None:
    assert clock(*others).is_ahead(own) is ahead


def test_a_peer_that_fell_silent_is_not_waited_for() -> None:
    made = clock(3, 3)
    assert made.is_ahead(9)
    made.observe(records(3, 3), FRESH_S + 1)
    assert not made.is_ahead(9)
    made.observe(records(3, 3, sequence=2), FRESH_S + 2)
    assert made.is_ahead(9)


@pytest.mark.parametrize(
    ("own", "others", "behind"),
    [(5, [], False), (5, [5], False), (5, [6], True), (5, [5, 6], False), (5, [6, 6], True), (5, [4, 6, 6], True)],
)
def test_being_behind(own: int, others: list[int], behind: bool) -> None:
    assert clock(*others).is_behind(own) is behind
