"""Many matchers on a network that delivers in any order: always a maximal matching, never a circle of waiting."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from averaging.pairing import Accept, Action, Alone, Matcher, Phase, Propose, Reject, Withdraw
from averaging.priority import priority
from protocol.ids import PeerId

BEACON = b"run"


class Net:
    """Matchers joined by a network that delivers in any order, except that each stream keeps its own."""

    def __init__(self, rounds: dict[PeerId, int], lag: int, rng: random.Random, dead: set[PeerId]) -> None:
        peers = sorted([*rounds, *dead])
        self.rng = rng
        self.dead = dead
        self.matchers = {
            peer: Matcher(me=peer, round=rounds[peer], candidates=peers, beacon=BEACON, max_lag_rounds=lag)
            for peer in rounds
        }
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
        left = set(net.matchers)
        expected: dict[PeerId, PeerId] = {}
        for a, b in sorted(itertools.combinations(left, 2), key=lambda p: priority(BEACON, 5, *p), reverse=True):
            if a in left and b in left:
                expected |= {a: b, b: a}
                left -= {a, b}
        assert {me: new.partner for me, new in net.matchers.items() if new.partner} == expected

    @given(
        rounds=st.lists(st.integers(5, 8), min_size=1, max_size=8), lag=st.integers(0, 2), seed=st.integers(0, 2**32)
    )
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
