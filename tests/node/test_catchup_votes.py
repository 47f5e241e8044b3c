"""Which states a joiner may try, by the votes there are for them."""

from __future__ import annotations

import random

import pytest

from node.catchup import NUM_VOTES, choose_snapshots
from protocol.records import SnapshotRef
from tests.node.swarm import trainers
from tests.protocol.samples import identity

OLD = SnapshotRef(round=4, root="a" * 64, size_bytes=100)
NEW = SnapshotRef(round=8, root="b" * 64, size_bytes=100)
BEST_CLAIM = SnapshotRef(round=10**9, root="f" * 64, size_bytes=100)


@pytest.mark.parametrize("num_honest", [3, 4, 8])
@pytest.mark.parametrize("num_liars", [1, 2])
@pytest.mark.parametrize("num_copies", [0, 1, 3])
def test_liars_below_the_quorum_are_never_tried(num_honest: int, num_liars: int, num_copies: int) -> None:
    """However new their state is, and however few copies of the honest one there are yet."""
    offers = {number: [NEW] if number < num_copies else [] for number in range(num_honest)}
    offers |= {100 + number: [BEST_CLAIM] for number in range(num_liars)}
    assert num_liars < NUM_VOTES
    tried = [candidate.ref for candidate in choose_snapshots(trainers(offers))]
    assert tried == ([NEW] if num_copies == 3 else [])


def test_one_liar_cannot_vote_twice() -> None:
    offers = {0: [NEW], 1: [NEW], 2: [NEW], 3: [BEST_CLAIM, BEST_CLAIM]}
    assert [candidate.ref for candidate in choose_snapshots(trainers(offers))] == [NEW]


def test_a_liar_cannot_ride_on_an_honest_root() -> None:
    """A vote is for the round too: another round with the same bytes is another claim."""
    lie = NEW.model_copy(update={"round": 10**9})
    offers = {0: [NEW], 1: [NEW], 2: [NEW], 3: [lie]}
    assert [candidate.ref for candidate in choose_snapshots(trainers(offers))] == [NEW]


def test_the_newest_of_several_credible_states_comes_first() -> None:
    offers = {number: [OLD, NEW] for number in range(4)}
    best, second = choose_snapshots(trainers(offers))
    assert (best.ref, second.ref) == (NEW, OLD)
    assert best.voters == tuple(sorted(identity(number).peer_id for number in range(4)))


def test_in_a_small_swarm_all_must_agree_or_else_most() -> None:
    assert [c.ref for c in choose_snapshots(trainers({0: [NEW]}))] == [NEW]
    assert choose_snapshots(trainers({0: [NEW], 1: []})) == [], "one of two is no majority"
    assert [c.ref for c in choose_snapshots(trainers({0: [NEW], 1: [NEW], 2: [BEST_CLAIM]}))] == [NEW]
    both = choose_snapshots(trainers({0: [OLD, NEW], 1: [OLD, NEW], 2: [OLD]}))
    assert [c.ref for c in both] == [OLD, NEW], "all three before two of three"


def test_nobody_there() -> None:
    assert choose_snapshots({}) == []


def test_the_order_does_not_depend_on_the_order_of_records() -> None:
    offers = {number: [OLD, NEW] for number in range(6)}
    records = list(trainers(offers).items())
    expected = choose_snapshots(dict(records))
    random.Random(0).shuffle(records)
    assert choose_snapshots(dict(records)) == expected
