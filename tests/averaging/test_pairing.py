"""The matching alone, without streams: every order of delivery must end in the same kind of result."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging.pairing import (
    TRANSITIONS,
    Accept,
    Action,
    Alone,
    Event,
    Matcher,
    Phase,
    Propose,
    Reject,
    Tie,
    Withdraw,
    priority,
    ranking,
)
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
        values = [priority(BEACON, 3, A, B), priority(BEACON, 4, A, B), priority(b"x", 3, A, B), priority(BEACON, 3, A, C)]
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


class Net:
    """Matchers joined by a network that delivers in any order, except that each stream keeps its own."""

    def __init__(self, rounds: dict[PeerId, int], lag: int, rng: random.Random, dead: set[PeerId]) -> None:
        peers = sorted([*rounds, *dead])
        self.rng = rng
        self.dead = dead
        self.matchers = {peer: matcher(peer, peers, round=rounds[peer], lag=lag) for peer in rounds}
        self.numbers = itertools.count()
        self.queues: dict[int, list[tuple[PeerId, str, tuple[object, ...]]]] = {}
        self.ours: dict[tuple[PeerId, PeerId], int] = {}  # (proposer, candidate) → stream
        self.open: set[int] = set()
        self.alone: set[PeerId] = set()
        self.num_deliveries = 0

    def run(self) -> None:
        starts = list(self.matchers)
        self.rng.shuffle(starts)
        while starts or any(self.queues.values()):
            if starts and (not any(self.queues.values()) or self.rng.random() < 0.3):
                peer = starts.pop()
                self.perform(peer, self.matchers[peer].start())
                continue
            stream = self.rng.choice(sorted(number for number, queue in self.queues.items() if queue))
            to, kind, payload = self.queues[stream].pop(0)
            self.num_deliveries += 1
            assert self.num_deliveries < 200 * len(self.matchers) ** 2, "livelock"
            self.deliver(stream, to, kind, payload)

    def send(self, stream: int, to: PeerId, kind: str, *payload: object) -> None:
        self.queues.setdefault(stream, []).append((to, kind, payload))

    def perform(self, me: PeerId, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Alone():
                    self.alone.add(me)
                case Propose(peer, expected):
                    stream = self.ours[me, peer] = next(self.numbers)
                    self.open.add(stream)
                    self.send(stream, me, "opened", peer, expected)
                case Withdraw(peer):
                    stream = self.ours.pop((me, peer))
                    self.open.discard(stream)
                    self.send(stream, peer, "gone", me)
                case Accept(peer):
                    self.send(self.ours[peer, me], peer, "accepted", me) if (peer, me) in self.ours else None
                    if (peer, me) not in self.ours:  # withdrawn, the news is still on its way
                        self.perform(me, self.matchers[me].broke_off())
                case Reject(peer, reason, round):
                    if (peer, me) in self.ours:
                        self.send(self.ours[peer, me], peer, "rejected", me, reason, round)

    def deliver(self, stream: int, to: PeerId, kind: str, payload: tuple[object, ...]) -> None:
        new = self.matchers.get(to)
        peer = payload[0]
        assert isinstance(peer, str)
        peer = PeerId(peer)
        if kind == "gone":
            if new is not None:
                self.perform(to, new.hung_up(peer))
            return
        if stream not in self.open or new is None:
            if kind == "accepted":  # we had withdrawn: the acceptor meets a closed stream
                self.perform(peer, self.matchers[peer].broke_off())
            return
        if kind == "opened":
            if peer in self.dead:
                del self.ours[to, peer]
                self.perform(to, new.unreachable(peer))
                return
            new.sent(peer)
            self.send(stream, peer, "proposal", to, new.round, payload[1])
        elif kind == "proposal":
            assert isinstance(payload[1], int)
            assert isinstance(payload[2], int)
            self.perform(to, new.called(peer, payload[1], payload[2]))
        elif kind == "accepted":
            new.accepted(peer)
            self.perform(to, new.confirmed())
            self.send(stream, peer, "confirmed", to)
        elif kind == "confirmed":
            self.perform(to, new.confirmed())
        else:
            del self.ours[to, peer]
            self.open.discard(stream)
            self.perform(to, new.turned_down(peer, payload[1], payload[2]))  # type: ignore[arg-type]


def check(net: Net, lag: int) -> None:
    partners = {me: new.partner for me, new in net.matchers.items() if new.phase is Phase.MATCHED}
    for me, partner in partners.items():
        assert partner is not None
        assert partners[partner] == me
        assert abs(net.matchers[me].round - net.matchers[partner].round) <= lag
    unpaired = sorted(set(net.matchers) - set(partners))
    assert net.alone <= set(unpaired)
    awaited = {me: candidate for me, candidate in net.ours if me in unpaired and me not in net.alone}
    assert net.alone | set(awaited) == set(unpaired)
    for me in awaited:  # every chain of waiting ends with one who is done with an earlier round and will come again
        chain = [me]
        while chain[-1] in awaited:
            chain.append(awaited[chain[-1]])
            assert len(chain) <= len(net.matchers), "a circle of waiting"
        assert net.matchers[chain[-1]].round < net.matchers[chain[-2]].round
    for first, second in itertools.product(net.alone, unpaired):
        far = abs(net.matchers[first].round - net.matchers[second].round) > lag
        assert first == second or far, "two left over could have paired"


class TestManyMatchers:
    @given(num_peers=st.integers(1, 9), num_dead=st.integers(0, 3), seed=st.integers(0, 2**32))
    @settings(max_examples=150, deadline=None, derandomize=True)
    def test_same_round_gives_the_greedy_matching_in_any_order(self, num_peers: int, num_dead: int, seed: int) -> None:
        names = [PeerId(f"p{i}") for i in range(num_peers + num_dead)]
        dead = set(names[num_peers:])
        net = Net(dict.fromkeys(names[:num_peers], 5), 1, random.Random(seed), dead)
        net.run()
        check(net, lag=1)
        left, expected = set(net.matchers), {}
        for a, b in sorted(itertools.combinations(left, 2), key=lambda p: priority(BEACON, 5, *p), reverse=True):
            if a in left and b in left:
                expected |= {a: b, b: a}
                left -= {a, b}
        assert {me: new.partner for me, new in net.matchers.items() if new.partner} == expected

    @given(rounds=st.lists(st.integers(5, 8), min_size=1, max_size=8), lag=st.integers(0, 2), seed=st.integers(0, 2**32))
    @settings(max_examples=300, deadline=None, derandomize=True)
    def test_mixed_rounds_never_block_and_leave_no_possible_pair(self, rounds: list[int], lag: int, seed: int) -> None:
        net = Net({PeerId(f"p{i}"): round for i, round in enumerate(rounds)}, lag, random.Random(seed), set())
        net.run()
        check(net, lag)

    def test_33_peers(self) -> None:
        for seed in range(5):
            net = Net({PeerId(f"p{i}"): 5 for i in range(33)}, 1, random.Random(seed), set())
            net.run()
            check(net, lag=1)
            assert len(net.alone) == 1
