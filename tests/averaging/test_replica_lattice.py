"""φ and θ through the lattice codec: what was found to be readable sets the window."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from averaging.fragments import Piece
from averaging.outer import OuterConfig
from averaging.replica import Replica, ReplicaConfig
from averaging.window import LatticeWindow
from tests.averaging.replicas import LOSSY, OPEN, exchange, meet, noise, received, swarm, train

NUMEL = 16 * 256 + 50
LATTICE = replace(LOSSY, slow_codec="lattice")
RULES = [OuterConfig(), OuterConfig(theta_only=True), OuterConfig(algorithm="pair-average")]


def spread(replicas: list[Replica]) -> float:
    stack = torch.stack([replica.phi for replica in replicas])
    return float((stack - stack.mean(0)).norm())


def train_all(replicas: list[Replica], step: int, *, private: float = 0.5) -> None:
    for number, replica in enumerate(replicas):
        train(replica, 10**6 + step, scale=1e-3 * (1 - private) ** 0.5)
        train(replica, 100 * step + number, scale=1e-3 * private**0.5)


def run(config: ReplicaConfig, *, rounds: int, private: float = 0.5) -> tuple[list[Replica], float]:
    """Replicas after some rounds in random pairs, and the mean share of unreadable blocks in the second half."""
    replicas, generator = swarm(8, config, numel=NUMEL), torch.Generator().manual_seed(0)
    shares = []
    for step in range(rounds):
        train_all(replicas, step, private=private)
        shares += [outcome.unreadable_share for outcome in meet(replicas, range(8), generator, round=step)]
    late = shares[len(shares) // 2 :]
    return replicas, sum(late) / len(late)


@pytest.mark.parametrize("outer", RULES, ids=lambda outer: f"{outer.algorithm} {outer.theta_only}")
@pytest.mark.parametrize("private", [0.2, 1.0])
def test_replicas_stay_as_near_as_with_more_bytes(outer: OuterConfig, private: float) -> None:
    lattice, unreadable = run(replace(LATTICE, outer=outer), rounds=24, private=private)
    exact, _ = run(replace(LOSSY, outer=outer), rounds=24, private=private)
    assert lattice[0].num_payload_bytes < 0.8 * exact[0].num_payload_bytes
    assert unreadable < 0.05
    assert spread(lattice) < 1.5 * spread(exact)


@pytest.mark.parametrize("rounds_alone", [0, 6])
@pytest.mark.parametrize("outer", RULES, ids=lambda outer: f"{outer.algorithm} {outer.theta_only}")
def test_who_was_alone_can_be_read(outer: OuterConfig, rounds_alone: int) -> None:
    replicas = swarm(2, replace(LATTICE, outer=outer), numel=NUMEL)
    for step in range(rounds_alone):
        train_all(replicas, step, private=1.0)
        for replica in replicas:
            replica.pack(round=step, tokens=1)
            replica.apply([])
    train_all(replicas, rounds_alone, private=1.0)
    outcomes = meet(replicas, range(2), torch.Generator(), round=rounds_alone)
    assert max(outcome.unreadable_share for outcome in outcomes) < 0.02


def test_fragments_are_alone_each_for_itself() -> None:
    config = replace(LATTICE, fragments=4, outer=OuterConfig(algorithm="pair-average"))
    replicas, generator = swarm(2, config, numel=64 * 4096), torch.Generator().manual_seed(0)
    for step in range(25):
        for number, replica in enumerate(replicas):
            train(replica, 100 * step + number)
        if step % 4 == 0 and step < 24:  # fragment 0 has no partner, six times
            for replica in replicas:
                replica.pack(round=step, tokens=1)
                replica.apply([])
        else:
            outcomes = meet(replicas, range(2), generator, round=step)
    assert max(outcome.unreadable_share for outcome in outcomes) < 0.02


@pytest.mark.parametrize("outer", RULES, ids=lambda outer: f"{outer.algorithm} {outer.theta_only}")
def test_new_weights_begin_with_a_new_window(outer: OuterConfig) -> None:
    config = replace(LATTICE, outer=outer)
    replicas, generator = swarm(4, config, numel=NUMEL), torch.Generator().manual_seed(0)
    for step in range(6):
        train_all(replicas, step)
        meet(replicas, range(4), generator, round=step)
    lost, near = replicas[0], replicas[1]
    window = lost._payloads.window
    assert window is not None
    for _ in range(16):
        window.widen()
    lost.replace_slow(near.phi)
    train_all(replicas, 6)
    before = float((lost.theta - near.theta).norm())
    exchange([lost, near], round=6)
    assert float((lost.theta - near.theta).norm()) < before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("outer", RULES, ids=lambda outer: f"{outer.algorithm} {outer.theta_only}")
def test_a_diverged_round_leaves_the_window(outer: OuterConfig, bad: float) -> None:
    replicas, generator = swarm(2, replace(LATTICE, outer=outer), numel=NUMEL), torch.Generator().manual_seed(0)
    for step in range(3):
        train_all(replicas, step)
        meet(replicas, range(2), generator, round=step)
    window = replicas[0]._payloads.window
    assert window is not None
    before = window.distance.clone()
    replicas[0].theta[0] = bad
    with pytest.raises(FloatingPointError):
        replicas[0].pack(round=3, tokens=1)
    assert torch.equal(window.distance[0], before[0])
    assert torch.isfinite(window.distance).all()


def test_replicas_that_are_too_far_refuse_each_other_and_then_find_back() -> None:
    replicas, generator = swarm(8, LATTICE, numel=NUMEL), torch.Generator().manual_seed(0)
    for step in range(15):
        train_all(replicas, step)
        for half in (range(4), range(4, 8)):
            meet(replicas, half, generator)
    for replica in replicas[4:]:
        for vector in (replica.phi, replica.theta):
            vector.add_(noise(99, 0.01, NUMEL))  # as if after a long partition: ten rounds' worth of motion
    left, right = replicas[0], replicas[4]
    update = received(right.pack(round=0, tokens=1), 4)
    left.pack(round=0, tokens=1)
    outcome = left.apply([update])
    assert outcome.kind == "refused"
    assert outcome.unreadable_share > 0.5
    assert outcome.verdicts[update.peer].reason == "replicas are too far apart for the lattice codec"
    apart = spread(replicas)
    kinds = []
    for step in range(15, 35):
        train_all(replicas, step)
        kinds.append({outcome.kind for outcome in meet(replicas, range(8), generator)})
    assert "refused" in kinds[0]
    assert all("refused" not in kind for kind in kinds[-10:])
    assert spread(replicas) < 0.3 * apart


def test_a_refused_lattice_update_is_the_solo_step() -> None:
    alone, met = (Replica(noise(0, 0.02, NUMEL), replace(LATTICE, delta_codec="fp32")) for _ in range(2))
    far = Replica(noise(1, 0.02, NUMEL), replace(LATTICE, delta_codec="fp32"))
    for replica in (alone, met, far):
        train(replica, 1)
        replica.pack(round=0, tokens=1)
    alone.apply([])
    outcome = met.apply([received(far.pack(round=0, tokens=1), 1)])
    assert outcome.kind == "refused"
    assert torch.equal(met.phi, alone.phi)
    assert torch.equal(met.momentum, alone.momentum)


def test_progress_made_meanwhile_does_not_disturb_the_reading() -> None:
    """θ moves on while the bytes travel; what was packed is what partners' codes are resolved with."""
    config = replace(LATTICE, outer=OuterConfig(algorithm="pair-average"))
    still, moving = swarm(2, config, numel=NUMEL), swarm(2, config, numel=NUMEL)
    for replicas in (still, moving):
        for number, replica in enumerate(replicas):
            train(replica, 1)
            train(replica, 10 + number, scale=1e-4)
    exchange(still)
    updates = [received(replica.pack(round=0, tokens=100), number) for number, replica in enumerate(moving)]
    for number, replica in enumerate(moving):
        train(replica, 50 + number, scale=0.1)
        outcome = replica.apply([updates[1 - number]])
        assert outcome.unreadable_share == 0.0
        assert torch.equal(replica.phi, still[number].phi)


def test_the_window_is_part_of_the_state() -> None:
    replicas, _ = run(LATTICE, rounds=4)
    restored = Replica(replicas[0].theta.clone(), LATTICE)
    restored.load_state_dict({name: tensor.clone() for name, tensor in replicas[0].state_dict().items()})
    for replica in (replicas[0], restored):
        train(replica, 7)
    updates = [replica.pack(round=9, tokens=1).slow for replica in (replicas[0], restored)]
    assert updates[0] == updates[1]
    assert "window" not in Replica(noise(0), OPEN).state_dict()


def test_a_diverged_round_leaves_a_usable_window() -> None:
    replicas, _ = run(LATTICE, rounds=2)
    for replica in replicas[:2]:
        replica.theta[700] = torch.nan
        with pytest.raises(FloatingPointError, match="not finite"):
            replica.pack(round=2, tokens=1)
        assert replica.state_dict()["window"].isfinite().all()
        replica.theta.copy_(replica.phi)
    outcomes = exchange(replicas[:2])
    assert {outcome.kind for outcome in outcomes} == {"averaged"}


def motion_of(window: LatticeWindow, moved: float) -> torch.Tensor:
    """Per-block motion of 512 + 64 elements of size 1 that moved by `moved`."""
    size, piece = torch.ones(576), Piece(slice(0, 576), 0)
    out = window.motion(piece, size, (torch.full((576,), moved),), round=0, out=torch.empty(576))
    return out[[0, 256, 512]]


def test_motion_is_bounded_by_the_weights_and_by_bfloat16() -> None:
    window = LatticeWindow(576, num_fragments=1, device=torch.device("cpu"))
    torch.testing.assert_close(motion_of(window, 0.0), torch.tensor([1.0, 1.0, 2.0]) * 2**-12)  # the tail is padded
    torch.testing.assert_close(motion_of(window, 0.25), torch.tensor([0.25, 0.25, 0.5]))
    torch.testing.assert_close(motion_of(window, 9.0), torch.tensor([1.0, 1.0, 2.0]))
    window.widen()
    torch.testing.assert_close(motion_of(window, 0.0), torch.tensor([1.0, 1.0, 2.0]))
