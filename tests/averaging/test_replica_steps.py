"""The size of the outer step: delayed steps, the momentum clip, partners of another round."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from averaging.outer import OuterConfig
from averaging.replica import Outcome, Replica
from tests.averaging.replicas import LOSSY, NUMEL, OPEN, noise, received, swarm, train

NESTEROV = OuterConfig(algorithm="diloco", alpha=0.9)


def averaged(outer: OuterConfig, *, steps_since_pack: int, rounds: int = 1) -> tuple[Replica, Outcome]:
    """A replica after some rounds with one partner, all with the same start and progress; the last outcome."""
    replicas = swarm(2, replace(LOSSY, outer=outer), equal=False)
    for round in range(rounds):
        for number, replica in enumerate(replicas):
            train(replica, 10 * round + number)
        updates = [received(replica.pack(round=round, tokens=1), number) for number, replica in enumerate(replicas)]
        outcomes = [
            replica.apply([updates[1 - number]], steps_since_pack=steps_since_pack)
            for number, replica in enumerate(replicas)
        ]
    return replicas[0], outcomes[0]


@pytest.mark.parametrize(
    "outer", [OuterConfig(), NESTEROV, OuterConfig(algorithm="sparseloco"), OuterConfig(algorithm="pair-average")]
)
def test_a_delayed_step_is_shortened(outer: OuterConfig) -> None:
    plain, _ = averaged(outer, steps_since_pack=3)
    prompt, outcome = averaged(replace(outer, staleness_penalty=0.25), steps_since_pack=0)
    assert torch.equal(plain.phi, prompt.phi), (
        "a prompt step is not penalised, and without a penalty delay changes nothing"
    )
    assert outcome.step_scale == 1.0
    late, outcome = averaged(replace(outer, staleness_penalty=0.25), steps_since_pack=3)
    assert outcome.step_scale == 0.25
    start = noise(0, 0.02)
    if outer.algorithm == "pair-average":
        start += noise(0, 1e-3)  # its step begins at θ
    torch.testing.assert_close(late.phi - start, 0.25 * (plain.phi - start), rtol=0, atol=1e-8)
    assert torch.equal(late.momentum, plain.momentum), "momentum remembers the whole step"


@pytest.mark.parametrize("outer", [OuterConfig(alpha=0.5), NESTEROV, replace(NESTEROV, momentum="heavy-ball")])
def test_the_momentum_clip_bounds_the_step(outer: OuterConfig) -> None:
    """Also over many rounds of the same direction, in which momentum would build up; and with a partner that is far away."""
    clipped = Replica(noise(0, 0.02), replace(OPEN, outer=replace(outer, momentum_clip=0.5)))
    far = Replica(noise(1, 0.02), replace(OPEN, outer=outer))
    scales = []
    for round in range(6):
        before, momentum = clipped.phi.clone(), clipped.momentum.clone()
        for replica in (clipped, far):
            train(replica, 7)
        update = received(far.pack(round=round, tokens=1), 1)
        clipped.pack(round=round, tokens=1)
        outcome = clipped.apply([update] if round % 2 else [])
        far.apply([])
        length = float((clipped.phi - before).norm())
        assert length <= 0.5 * outcome.delta_norm * (1 + 1e-4)
        assert outcome.step_scale < 1.0
        if outer.algorithm == "noloco":
            torch.testing.assert_close(clipped.momentum, clipped.phi - before, rtol=0, atol=1e-8)
        assert not torch.equal(clipped.momentum, momentum)
        scales.append(outcome.step_scale)
    assert len(set(scales)) > 1


def test_a_step_within_the_clip_is_left_as_it_is() -> None:
    plain, _ = averaged(NESTEROV, steps_since_pack=0, rounds=3)
    clipped, outcome = averaged(replace(NESTEROV, momentum_clip=1000.0), steps_since_pack=0, rounds=3)
    assert outcome.step_scale == 1.0
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, clipped.state_dict()[name])


def test_clip_and_penalty_multiply() -> None:
    outer = replace(NESTEROV, momentum_clip=0.5, staleness_penalty=0.5)
    replica, outcome = averaged(outer, steps_since_pack=1)
    assert float((replica.phi - noise(0, 0.02)).norm()) == pytest.approx(0.25 * outcome.delta_norm, rel=1e-4)


@pytest.mark.parametrize(("lag_rounds", "share"), [(0, 0.5), (1, 0.25), (2, 0.125)])
def test_a_partner_of_another_round_pulls_less(lag_rounds: int, share: float) -> None:
    """On both sides alike, so that the mean of φ is conserved."""
    replicas = swarm(2, OPEN, equal=False)
    start = [replica.phi.clone() for replica in replicas]
    rounds = 5, 5 + lag_rounds
    updates = [received(r.pack(round=rounds[n], tokens=1), n) for n, r in enumerate(replicas)]
    for number, replica in enumerate(replicas):
        replica.apply([updates[1 - number]])
        expected = start[number] + 0.7 * share * (start[1 - number] - start[number])
        torch.testing.assert_close(replica.phi, expected, rtol=0, atol=1e-8)
    assert replicas[0].phi.numel() == NUMEL
