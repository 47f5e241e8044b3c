"""Agreement on the group, without a network."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from averaging.allreduce_messages import MAX_BALLOTS, MAX_MEMBERS, Ballot
from averaging.allreduce_roster import Ballots, Roster, group_of, roster_digest
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from tests.averaging.swarm import RUN, identities

A, B, C, D, E = sorted(identity.peer_id for identity in identities(5))
EVERYBODY = (A, B, C, D, E)


def play(
    seen: Mapping[PeerId, Roster], liars: Mapping[PeerId, list[Roster]] | None = None
) -> dict[PeerId, Roster | None]:
    """Everybody hears whom it sees; liars vote as scripted. The group of every honest peer, None where it found none."""
    liars = liars or {}
    boxes = {me: Ballots(me, EVERYBODY) for me in seen if me not in liars}
    rosters: dict[PeerId, Roster] = dict(seen)
    done: dict[PeerId, Roster | None] = {}
    for number in range(MAX_BALLOTS):
        votes = {me: liars[me][number] if me in liars else rosters[me] for me in seen if me not in done}
        for me, box in boxes.items():
            for peer, vote in votes.items():
                if peer != me and peer in seen[me]:
                    box.hear(peer, Ballot(number=number, members=list(vote)))
        newly = {}
        for me, box in boxes.items():
            if me in done:
                continue
            tally = box.count(number, rosters[me])
            rosters[me] = tally.roster
            if tally.kind != "again":
                newly[me] = tally.roster if tally.kind == "agreed" else None
        for me in newly:
            for other, box in boxes.items():
                if other != me and me in seen[other]:
                    box.settle(me)
        done |= newly
    return done


def test_alike_views_agree_on_the_first_ballot() -> None:
    box = Ballots(A, EVERYBODY)
    for peer in (B, C):
        box.hear(peer, Ballot(number=0, members=[A, B, C]))
    assert box.has(B, 0)
    assert not box.has(B, 1)
    tally = box.count(0, (A, B, C))
    assert (tally.kind, tally.roster) == ("agreed", (A, B, C))


def test_a_broken_link_between_two_throws_nobody_out() -> None:
    seen = {A: EVERYBODY, B: (A, B, D, E), C: (A, C, D, E), D: EVERYBODY, E: EVERYBODY}
    assert play(seen) == dict.fromkeys(EVERYBODY, EVERYBODY)
    chain = {A: (A, B, C), B: (A, B), C: (A, C)}
    assert play(chain) == dict.fromkeys((A, B, C), (A, B, C))


def test_a_peer_that_one_has_seen_and_the_others_not_is_left_out() -> None:
    seen = {A: (A, B, C, D, E), B: (A, B, C, D), C: (A, B, C, D), D: (A, B, C, D)}
    assert play(seen) == dict.fromkeys((A, B, C, D), (A, B, C, D))


def test_two_halves_that_do_not_see_each_other_are_two_groups() -> None:
    seen = {A: (A, B), B: (A, B), C: (C, D, E), D: (C, D, E), E: (C, D, E)}
    assert play(seen) == {A: (A, B), B: (A, B), C: (C, D, E), D: (C, D, E), E: (C, D, E)}


@pytest.mark.parametrize("vote", [(A, E), (E,), (C, D, E)])
def test_a_liar_can_not_throw_others_out(vote: Roster) -> None:
    groups = play(dict.fromkeys(EVERYBODY, EVERYBODY), {E: [vote] * MAX_BALLOTS})
    assert groups == dict.fromkeys((A, B, C, D), EVERYBODY)


def test_a_liar_can_not_invent_members() -> None:
    ghost = identities(6)[5].peer_id
    assert ghost not in EVERYBODY
    groups = play({A: (A, E), E: (A, E)}, {E: [tuple(sorted((A, E, ghost)))] * MAX_BALLOTS})
    assert groups == {A: (A, E)}


def test_without_agreement_there_is_no_group() -> None:
    box = Ballots(A, EVERYBODY)
    for number in range(MAX_BALLOTS):
        for peer, members in ((B, [B, C]), (C, [C, D]), (D, [D, E])):
            box.hear(peer, Ballot(number=number, members=[*members]))
    assert box.count(0, (A, B)).kind == "failed", "nobody wants us"
    assert box.count(MAX_BALLOTS - 1, (A, B)).kind == "failed"


def test_whoever_has_settled_stands_by_its_last_ballot() -> None:
    box = Ballots(A, EVERYBODY)
    box.hear(B, Ballot(number=0, members=[A, B]))
    box.settle(B)
    assert box.has(B, 2)
    assert box.count(2, (A, B)).kind == "agreed"
    box.forget(B)
    assert box.count(0, (A,)).roster == (A,)


@pytest.mark.parametrize(
    ("members", "number", "message"),
    [
        ([B, A], 0, "unsorted"),
        ([A, B, B], 0, "unsorted"),
        ([A], 0, "without its sender"),
        ([A, B], 1, "out of order"),
    ],
)
def test_bad_ballots_are_violations(members: list[str], number: int, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        Ballots(A, EVERYBODY).hear(B, Ballot(number=number, members=members))
    assert caught.value.peer == B


def test_parts_before_any_ballot_are_a_violation() -> None:
    with pytest.raises(ProtocolError, match="before any ballot"):
        Ballots(A, EVERYBODY).settle(B)


def test_a_large_swarm_is_dealt_into_groups_that_change() -> None:
    peers = [PeerId(f"peer{index:03}") for index in range(200)]
    groups = {peer: {*group_of(peer, peers, run=RUN, round=7), peer} for peer in peers}
    for peer, group in groups.items():
        assert 8 <= len(group) <= MAX_MEMBERS
        assert all(groups[other] == group for other in group), "everybody deals alike"
        assert peer in group
    again = {*group_of(peers[0], peers, run=RUN, round=8), peers[0]}
    assert len(again & groups[peers[0]]) < len(again) / 2
    few = peers[:MAX_MEMBERS]
    assert set(group_of(few[0], few, run=RUN, round=7)) == set(few[1:])


def test_the_digest_names_run_round_and_members() -> None:
    digests = {
        roster_digest((A, B), run=RUN, round=1),
        roster_digest((A, B), run=RUN, round=2),
        roster_digest((A, C), run=RUN, round=1),
    }
    assert len(digests) == 3
