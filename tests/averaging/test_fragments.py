"""The division of the model into fragments, and rounds that exchange one of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from averaging.fragments import Fragments
from averaging.outer import OuterConfig
from averaging.replica import Replica, ReplicaConfig
from tests.averaging.replicas import LOSSY, OPEN, exchange, meet, noise, received, swarm, train

NUMEL = 6 * 4096 + 300  # seven stripes, the last one short


@pytest.mark.parametrize("num_fragments", [1, 2, 3, 5, 7, 64])
@pytest.mark.parametrize("numel", [64 * 4096, 64 * 4096 + 1, 10_000_000])
def test_every_element_is_in_one_fragment(numel: int, num_fragments: int) -> None:
    fragments = Fragments(numel, num_fragments)
    seen = torch.zeros(numel, dtype=torch.int8)
    for fragment in range(num_fragments):
        start = 0
        for piece in fragments.pieces(fragment, max_numel=8192):
            assert piece.start == start
            assert piece.start % 4096 == 0
            assert piece.span.start % 4096 == 0
            assert 0 < piece.span.stop - piece.span.start <= 8192
            start += piece.span.stop - piece.span.start
            seen[piece.span] += 1
        assert start == fragments.numel(fragment)
        assert start <= fragments.numel(0), "fragment 0 is the longest, and buffers are made for it"
    assert bool((seen == 1).all())


def test_fragments_take_turns_and_are_strided() -> None:
    fragments = Fragments(NUMEL, 3)
    assert [fragments.index(round) for round in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [piece.span.start // 4096 for piece in fragments.pieces(0, max_numel=4096)] == [0, 3, 6]
    assert fragments.numel(0) == 2 * 4096 + 300


def test_fragments_of_a_large_model_are_of_nearly_the_same_length() -> None:
    fragments = Fragments(100_000_000, 8)
    lengths = [fragments.numel(fragment) for fragment in range(8)]
    assert sum(lengths) == 100_000_000
    assert max(lengths) < 1.1 * min(lengths)


def test_too_few_parameters_are_refused() -> None:
    assert Fragments(4097, 2).numel(1) == 1
    with pytest.raises(ValueError, match="too few for 2 fragments"):
        Fragments(4096, 2)
    with pytest.raises(ValueError, match="too few for 2 fragments"):
        Replica(noise(0, numel=100), replace(OPEN, fragments=2))


RULES = [
    OuterConfig(),
    OuterConfig(theta_only=True),
    OuterConfig(algorithm="diloco", alpha=0.9),
    OuterConfig(algorithm="sparseloco"),
    OuterConfig(algorithm="pair-average"),
]


@pytest.mark.parametrize("config", [OPEN, LOSSY, replace(LOSSY, delta_codec="topk", slow_codec="lattice")])
@pytest.mark.parametrize("outer", RULES, ids=lambda outer: f"{outer.algorithm} {outer.theta_only}")
def test_a_turn_of_all_fragments_is_one_whole_round(outer: OuterConfig, config: ReplicaConfig) -> None:
    """Everything else equal, so without training in between; momentum and residual of two turns show that state is kept apart."""
    whole = swarm(2, replace(config, outer=outer), numel=NUMEL)
    parts = swarm(2, replace(config, outer=outer, fragments=3), numel=NUMEL)
    for turn in range(2):
        for replicas in (whole, parts):
            for number, replica in enumerate(replicas):
                train(replica, 10 * turn + number)
        exchange(whole, round=turn)
        for round in range(3 * turn, 3 * turn + 3):
            exchange(parts, round=round)
    for one, other in zip(whole, parts, strict=True):
        for name, tensor in one.state_dict().items():
            in_parts = other.state_dict()[name]  # the window's drift is one number per fragment
            assert torch.equal(tensor.expand_as(in_parts), in_parts), name
        assert torch.equal(one.theta, other.theta)


def test_a_round_touches_its_fragment_only() -> None:
    replicas = swarm(2, replace(LOSSY, fragments=3), numel=NUMEL)
    for number, replica in enumerate(replicas):
        train(replica, number)
    before = [{"theta": r.theta.clone()} | {n: t.clone() for n, t in r.state_dict().items()} for r in replicas]
    exchange(replicas, round=4)
    inside = torch.zeros(NUMEL, dtype=torch.bool)
    for piece in Fragments(NUMEL, 3).pieces(1, max_numel=4096):
        inside[piece.span] = True
    for replica, old in zip(replicas, before, strict=True):
        for name, tensor in (replica.state_dict() | {"theta": replica.theta}).items():
            assert torch.equal(tensor[~inside], old[name][~inside]), name
            assert not torch.equal(tensor[inside], old[name][inside]), name


@pytest.mark.parametrize("slow_codec", ["bf16", "lattice"])
def test_bytes_of_a_round_are_exact(slow_codec: str) -> None:
    config = replace(LOSSY, fragments=3, slow_codec=slow_codec)
    replica = Replica(noise(0, numel=NUMEL), config)
    sizes = []
    for round in range(6):
        update = replica.pack(round=round, tokens=1)
        assert (update.delta.nbytes, update.slow.nbytes) == config.payload_bytes(NUMEL, round)
        assert update.num_bytes == replica.round_bytes(round)
        sizes.append(update.num_bytes)
        replica.apply([])
    assert sizes[0] > sizes[1] == sizes[2]
    assert sum(sizes[:3]) == sum(replace(config, fragments=1).payload_bytes(NUMEL))
    assert replica.num_payload_bytes == sizes[0]


def test_another_fragment_is_refused() -> None:
    replicas = swarm(2, replace(OPEN, fragments=3), numel=3 * 4096)
    update = received(replicas[1].pack(round=1, tokens=1), 1)
    replicas[0].pack(round=0, tokens=1)
    outcome = replicas[0].apply([update])
    assert outcome.kind == "refused"
    assert "another fragment" in outcome.verdicts[update.peer].reason


def test_blend_keeps_a_share_of_the_local_weights() -> None:
    plain, blended = (Replica(noise(0, numel=NUMEL), replace(OPEN, fragments=2, blend=blend)) for blend in (0.0, 0.25))
    for replica in (plain, blended):
        train(replica, 1)
    anchor = plain.theta.clone()
    outcomes = []
    for replica in (plain, blended):
        replica.pack(round=0, tokens=1)
        outcomes.append(replica.apply([]))
    assert torch.equal(blended.phi, plain.phi)
    torch.testing.assert_close(blended.theta, 0.25 * anchor + 0.75 * plain.theta, rtol=0, atol=1e-6)
    assert outcomes[1].shift_norm == pytest.approx(0.75 * outcomes[0].shift_norm)


def test_blend_keeps_the_progress_made_meanwhile() -> None:
    still, moving = (Replica(noise(0, numel=NUMEL), replace(OPEN, fragments=2, blend=0.5)) for _ in range(2))
    for replica in (still, moving):
        train(replica, 1)
        replica.pack(round=1, tokens=1)
    progress = train(moving, 2)
    for replica in (still, moving):
        replica.apply([])
    torch.testing.assert_close(moving.theta, still.theta + progress, rtol=0, atol=1e-6)


# ---- random fragments


def covered(fragments: Fragments, round: int, numel: int) -> torch.Tensor:
    """What a round exchanges, bool [numel]; its pieces are in order and begin at whole blocks."""
    seen, start = torch.zeros(numel, dtype=torch.bool), 0
    for piece in fragments.pieces(fragments.index(round), max_numel=8192):
        assert piece.start == start
        assert piece.start % 4096 == 0
        assert not seen[piece.span].any()
        seen[piece.span] = True
        start += piece.span.stop - piece.span.start
    assert start == fragments.numel(fragments.index(round)) <= fragments.max_numel
    return seen


@pytest.mark.parametrize("numel", [64 * 4096 + 1, 1_000_000])
def test_random_fragments_are_of_one_size_and_favour_nobody(numel: int) -> None:
    first, again = (Fragments(numel, 8, choice="random") for _ in range(2))
    rounds = 200
    times = torch.zeros(numel)
    for round in range(rounds):
        seen = covered(first, round, numel)
        assert torch.equal(seen, covered(again, round, numel)), "both ends draw alike"
        times += seen
        assert abs(int(seen.sum()) - first.max_numel) < first.stripe_numel
        assert not first.is_same(round, round + 8)
    share = first.max_numel / numel
    assert float((times / rounds - share).abs().max()) < 5 * (share / rounds) ** 0.5


SPARSE = [OuterConfig(algorithm="pair-average"), OuterConfig(theta_only=True)]
RANDOM = replace(OPEN, outer=SPARSE[0], fragments=3, fragment_choice="random", slow_codec="fp32")


@pytest.mark.parametrize("outer", SPARSE, ids=lambda outer: outer.algorithm)
def test_a_random_share_is_averaged_and_the_rest_is_left_alone(outer: OuterConfig) -> None:
    replicas = swarm(2, replace(RANDOM, outer=outer), numel=NUMEL)
    whole = swarm(2, replace(RANDOM, outer=outer, fragments=1, fragment_choice="turn"), numel=NUMEL)
    for round in (0, 5):
        for pair in (replicas, whole):
            for number, replica in enumerate(pair):
                train(replica, 10 * round + number)
        before = [replica.theta.clone() for replica in replicas]
        exchange(replicas, round=round)
        inside = covered(Fragments(NUMEL, 3, choice="random"), round, NUMEL)
        for replica, old in zip(replicas, before, strict=True):
            assert torch.equal(replica.theta[~inside], old[~inside])
        if outer.algorithm == "pair-average":
            mean = (before[0] + before[1]) / 2
            for replica in replicas:
                torch.testing.assert_close(replica.theta[inside], mean[inside], rtol=0, atol=1e-7)
        elif round == 0:  # what is exchanged is exchanged as in a whole round
            exchange(whole, round=0)
            torch.testing.assert_close(replicas[0].theta[inside], whole[0].theta[inside], rtol=0, atol=1e-7)


@pytest.mark.parametrize("slow_codec", ["fp32", "bf16", "q8", "q4", "lattice"])
def test_bytes_of_random_shares_are_exact(slow_codec: str) -> None:
    config = replace(RANDOM, slow_codec=slow_codec)
    replica = Replica(noise(0, numel=NUMEL), config)
    for round in range(9):
        update = replica.pack(round=round, tokens=1)
        assert (update.delta.nbytes, update.slow.nbytes) == config.payload_bytes(NUMEL, round)
        assert update.num_bytes == replica.round_bytes(round) <= replica.num_payload_bytes
        replica.apply([])


@pytest.mark.parametrize("outer", SPARSE, ids=lambda outer: outer.algorithm)
def test_random_shares_keep_replicas_together_in_four_bits(outer: OuterConfig) -> None:
    """Half of the progress private, a third of the weights per round; every fourth round nobody is there."""
    config = replace(LOSSY, outer=outer, fragments=3, fragment_choice="random", slow_codec="lattice")
    replicas, apart, unreadable = swarm(4, config, numel=NUMEL), [], []
    generator = torch.Generator().manual_seed(0)
    for round in range(80):
        for number, replica in enumerate(replicas):
            train(replica, 10**6 + round, scale=1e-3)
            train(replica, 100 * round + number, scale=1e-3)
        outcomes = meet(replicas, range(4 if round % 4 else 0), generator, round=round)
        unreadable += [outcome.unreadable_share for outcome in outcomes]
        stack = torch.stack([replica.theta for replica in replicas])
        apart.append(float((stack - stack.mean(0)).norm(dim=1).mean()))
    alone = 1e-3 * NUMEL**0.5 * 80**0.5  # how far random walks go
    assert max(apart[40:]) < 0.5 * alone
    assert sum(unreadable) / len(unreadable) < 0.03


def test_random_shares_of_different_rounds_do_not_meet() -> None:
    replicas = swarm(2, RANDOM, numel=NUMEL)
    update = received(replicas[1].pack(round=3, tokens=1), 1)
    replicas[0].pack(round=0, tokens=1)
    assert replicas[0].apply([update]).kind == "refused"


def test_random_fragments_of_delta_are_refused() -> None:
    with pytest.raises(ValueError, match="sends θ alone"):
        replace(RANDOM, outer=OuterConfig())
    with pytest.raises(ValueError, match="fragments > 1"):
        replace(RANDOM, fragments=1)
