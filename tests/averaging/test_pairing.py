"""The matching alone, without streams: every order of delivery must end in the same kind of result."""

from __future__ import annotations

import itertools

import pytest

from averaging.pairing import (
    Accept,
    Alone,
    Matcher,
    Phase,
    Propose,
    Reject,
    Withdraw,
)
from averaging.priority import foreseen_partner, priority, ranking
from averaging.ties import TRANSITIONS, Event, Tie
from protocol.ids import PeerId

BEACON = b"run"
A, B, C, D = (PeerId(name) for name in "abcd")


def matcher(me: PeerId, candidates: list[PeerId], *, round: int = 5, lag: int = 1) -> Matcher:
    return Matcher(me=me, round=round, candidates=candidates, beacon=BEACON, max_lag_rounds=lag)


def started(me: PeerId, candidates: list[PeerId], *, round: int = 5, lag: int = 1) -> tuple[Matcher, PeerId]:
    """A matcher whose first proposal is out, and to whom."""
    new = matcher(me, candidates, round=round, lag=lag)
    [action] = new.start()
    assert isinstance(action, Propose)
    new.sent(action.peer)
    return new, action.peer


class TestPriority:
    def test_both_ends_compute_the_same(self) -> None:
        assert priority(BEACON, 3, A, B) == priority(BEACON, 3, B, A)

    def test_changes_with_round_beacon_and_ids(self) -> None:
        values = [
            priority(BEACON, 3, A, B),
            priority(BEACON, 4, A, B),
            priority(b"x", 3, A, B),
            priority(BEACON, 3, A, C),
        ]
        assert len(set(values)) == 4

    def test_is_the_documented_hash(self) -> None:
        # computed once and written down: peers of different versions must agree on who pairs with whom
        assert priority(b"beacon", 7, PeerId("x"), PeerId("y")) >> 224 == 0x0E50DA9E

    def test_ranking_leaves_oneself_and_duplicates_out(self) -> None:
        order = ranking(BEACON, 3, A, [A, B, C, B])
        assert sorted(order) == [B, C]
        assert priority(BEACON, 3, A, order[0]) > priority(BEACON, 3, A, order[1])

    def test_everybody_is_first_choice_about_equally_often(self) -> None:
        firsts = [ranking(BEACON, round, A, [B, C, D])[0] for round in range(600)]
        assert all(150 <= firsts.count(peer) <= 250 for peer in (B, C, D))


class TestForesight:
    PEERS = tuple(PeerId(f"peer {number}") for number in range(16))

    def test_both_ends_foresee_each_other(self) -> None:
        for round in range(20):
            foreseen = {peer: foreseen_partner(BEACON, round, peer, self.PEERS) for peer in self.PEERS}
            assert all(partner is not None and foreseen[partner] == peer for peer, partner in foreseen.items())

    def test_the_best_tie_of_all_is_foreseen(self) -> None:
        best = max(itertools.combinations(self.PEERS, 2), key=lambda tie: priority(BEACON, 7, *tie))
        assert foreseen_partner(BEACON, 7, best[0], self.PEERS) == best[1]

    def test_of_an_odd_number_one_is_alone(self) -> None:
        assert foreseen_partner(BEACON, 3, A, []) is None
        assert [foreseen_partner(BEACON, 3, peer, [A, B, C]) for peer in (A, B, C)].count(None) == 1

    def test_among_very_many_it_is_the_best_candidate(self) -> None:
        many = [PeerId(f"peer {number}") for number in range(100)]
        assert foreseen_partner(BEACON, 3, A, many) == ranking(BEACON, 3, A, many)[0]


class TestTable:
    LOCAL_BUGS = frozenset(itertools.product(Tie, Event)) - frozenset(TRANSITIONS)

    @pytest.mark.parametrize(("tie", "event"), sorted(TRANSITIONS, key=str))
    def test_listed_steps_are_taken(self, tie: Tie, event: Event) -> None:
        new = matcher(A, [B])
        new._candidates[B].tie = tie
        new._step(B, event)
        assert new._candidates[B].tie is TRANSITIONS[tie, event]

    @pytest.mark.parametrize(("tie", "event"), sorted(LOCAL_BUGS, key=str))
    def test_every_other_step_is_a_bug(self, tie: Tie, event: Event) -> None:
        new = matcher(A, [B])
        new._candidates[B].tie = tie
        with pytest.raises(AssertionError):
            new._step(B, event)
        assert new._candidates[B].tie is tie

    def test_a_call_is_possible_at_any_time(self) -> None:
        assert all((tie, Event.CALLED) in TRANSITIONS for tie in Tie)


class TestOneMatcher:
    def test_without_candidates_steps_alone(self) -> None:
        assert matcher(A, [A]).start() == [Alone()]

    def test_proposes_to_the_best_then_to_the_next(self) -> None:
        order = ranking(BEACON, 5, A, [B, C, D])
        new, first = started(A, [B, C, D])
        assert first == order[0]
        assert new.turned_down(order[0], "matched", 6) == [Propose(order[1], 5)]
        assert new.unreachable(order[1]) == [Propose(order[2], 5)]
        assert new.turned_down(order[2], "unknown", 5) == [Alone()]
        assert new.phase is Phase.OVER

    def test_holds_a_worse_proposer_and_accepts_it_once_the_better_one_is_gone(self) -> None:
        best, second = ranking(BEACON, 5, A, [B, C])
        new, _ = started(A, [B, C])
        assert new.called(second, 5, 5) == []
        assert new.turned_down(best, "matched", 6) == [Accept(second)]
        assert (new.phase, new.partner) == (Phase.PAIRING, second)

    def test_held_proposals_are_looked_at_before_the_first_proposal(self) -> None:
        best, second = ranking(BEACON, 5, A, [B, C])
        new = matcher(A, [B, C])
        assert new.called(second, 5, 5) == []
        assert new.called(best, 5, 5) == []
        assert new.start() == [Accept(best)]
        assert new.confirmed() == [Reject(second, "matched", 6)]

    def test_of_two_crossing_proposals_the_smaller_ids_is_kept(self) -> None:
        small, _ = started(A, [B])
        assert small.called(B, 5, 5) == []
        large, _ = started(B, [A])
        assert large.called(A, 5, 5) == [Withdraw(A), Accept(A)]
        small.accepted(B)
        assert small.confirmed() == []

    def test_a_proposal_not_sent_yet_gives_way_even_to_the_larger_id(self) -> None:
        new = matcher(A, [B])
        new.start()
        assert new.called(B, 5, 5) == [Withdraw(B), Accept(B)]

    def test_a_crossing_proposal_that_fails_is_replaced_by_the_other(self) -> None:
        new, _ = started(A, [B])
        new.called(B, 5, 5)
        assert new.unreachable(B) == [Accept(B)]

    def test_strangers_and_far_rounds_are_turned_down(self) -> None:
        new, _ = started(A, [B])
        assert new.called(C, 5, 5) == [Reject(C, "unknown", 5)]
        assert new.called(B, 8, 5) == [Reject(B, "too-far", 5)]

    def test_a_wrong_belief_about_our_round_is_answered_at_once(self) -> None:
        new, _ = started(A, [B])
        assert new.called(B, 6, 6) == [Reject(B, "other-round", 5)]

    def test_peers_in_our_round_come_first(self) -> None:
        candidates = [B, C, D]
        best = ranking(BEACON, 5, A, candidates)[0]
        new, _ = started(A, candidates)
        [action] = new.turned_down(best, "other-round", 4)
        assert isinstance(action, Propose)
        assert action.peer != best
        others = [peer for peer in ranking(BEACON, 5, A, candidates) if peer != best]
        assert new.turned_down(others[0], "matched", 6) == [Propose(others[1], 5)]
        assert new.turned_down(others[1], "matched", 6) == [Propose(best, 4)]

    def test_a_candidate_that_contradicts_itself_is_dropped(self) -> None:
        new, _ = started(A, [B])
        assert new.turned_down(B, "other-round", 5) == [Alone()]

    def test_no_liar_is_asked_for_ever(self) -> None:
        new, _ = started(A, [B])
        for turn in range(100):
            if new.turned_down(B, "other-round", 4 + 2 * (turn % 2)) == [Alone()]:
                break
        assert turn < 8

    def test_one_ahead_of_us_waits_for_our_next_round(self) -> None:
        new, _ = started(A, [B, C])
        new.called(B, 5, 5)
        new.called(C, 5, 5)
        new.phase = Phase.MATCHED
        assert new.called(C, 6, 5) == [Reject(C, "matched", 6)]
        assert new.called(C, 6, 6) == []

    def test_pairs_across_rounds_rather_than_wait_for_one_that_must_train_first(self) -> None:
        done, other = ranking(BEACON, 6, A, [B, C])
        new, _ = started(A, [B, C], round=6)
        assert new.called(other, 5, 6) == []
        assert new.turned_down(done, "matched", 6) == [Accept(other)]

    def test_who_lets_us_wait_long_comes_last_until_it_calls(self) -> None:
        slow, other = ranking(BEACON, 5, A, [B, C])
        new, _ = started(A, [B, C])
        assert new.waited_long(slow) == [Withdraw(slow), Propose(other, 5)]
        new.sent(other)
        assert new.waited_long(other) == [Withdraw(other), Propose(slow, 5)]
        assert new.waited_long(slow) == []
        assert new.called(slow, 5, 5) == [Withdraw(slow), Accept(slow)]

    def test_breaking_off_twice_is_enough(self) -> None:
        new = matcher(A, [B, C])
        new.called(B, 5, 5)
        new.called(C, 5, 5)
        [accept] = new.start()
        assert isinstance(accept, Accept)
        first, second = accept.peer, B if accept.peer == C else C
        assert new.broke_off() == [Accept(second)]
        assert new.broke_off() == [Propose(first, 5)]
        assert new.called(first, 5, 5) == [Withdraw(first), Accept(first)]
        assert new.broke_off() == [Propose(second, 5)]
        assert new.called(first, 5, 5) == [Reject(first, "busy", 6)]

    def test_close_releases_everybody_once(self) -> None:
        best, second = ranking(BEACON, 5, A, [B, C])
        new, _ = started(A, [B, C])
        new.called(second, 5, 5)
        assert new.close() == [Reject(second, "busy", 6)]
        assert new.close() == []
        assert new.called(best, 5, 5) == [Reject(best, "busy", 6)]
