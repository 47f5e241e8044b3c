"""Admission at work: swarms with and without liars, measured by what honest peers reach. Numbers of one seed are in docs/LOG.md."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.averaging.gossip import ATTACKS, Gossip

ROUNDS = 60


def after(rounds: int, gossip: Gossip) -> Gossip:
    for _ in range(rounds):
        gossip.round()
    return gossip


@pytest.mark.parametrize("num_honest", [2, 3, 4, 16])
def test_honest_swarms_never_refuse_and_lose_little(num_honest: int) -> None:
    guarded = after(ROUNDS, Gossip(num_honest))
    trusting = after(ROUNDS, Gossip(num_honest, is_open=True))
    assert sum(guarded.kinds, Counter())["refused"] == 0
    assert guarded.loss < 1.1 * trusting.loss
    assert not any(replica.admission.is_astray for replica in guarded.replicas)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("num_honest", "num_liars"), [(4, 1), (12, 4)])
def test_a_liar_gains_little(num_honest: int, num_liars: int, attack: str) -> None:
    """Against the same swarm without liars; where everybody is trusted, all but one of these attacks ruin it."""
    attacked = after(ROUNDS, Gossip(num_honest, num_liars=num_liars, attack=ATTACKS[attack]))
    clean = after(ROUNDS, Gossip(num_honest + num_liars))
    assert attacked.loss < 1.5 * clean.loss
    assert attacked.spread < 2.0 * clean.spread
    honest = sum(attacked.kinds, Counter())
    assert honest["refused"] <= 0.03 * honest.total()


@pytest.mark.parametrize("attack", ["huge", "opposite", "pull away"])
def test_these_attacks_ruin_a_swarm_that_trusts_everybody(attack: str) -> None:
    ruined = after(ROUNDS, Gossip(4, num_liars=1, attack=ATTACKS[attack], is_open=True))
    assert ruined.loss > 3.0 * after(ROUNDS, Gossip(5, is_open=True)).loss


@pytest.mark.parametrize("num_peers", [4, 16])
def test_a_partition_of_150_rounds_heals(num_peers: int) -> None:
    """Without a common direction: both halves walk at random, as far apart as can be."""
    gossip, half = Gossip(num_peers, rate=0.0), num_peers // 2

    def apart() -> float:
        left, right = (
            torch.stack([r.phi for r in part]).mean(0) for part in (gossip.replicas[:half], gossip.replicas[half:])
        )
        return float((left - right).norm())

    for _ in range(150):
        gossip.round([range(half), range(half, num_peers)])
    at_first = apart()
    assert at_first > 5.0 * gossip.replicas[0].admission.thresholds(0.0)[1], "or there is nothing to heal"
    after(40, gossip)
    assert apart() < 0.15 * at_first
    assert sum(gossip.kinds[-10:], Counter())["refused"] == 0
    assert not any(replica.admission.is_astray for replica in gossip.replicas)


@pytest.mark.parametrize("num_peers", [3, 4, 8, 16])
def test_a_peer_that_went_astray_knows_it_and_the_others_do_not_think_so(num_peers: int) -> None:
    gossip = after(20, Gossip(num_peers, rate=0.0))
    lost, *others = gossip.replicas
    lost.replace_slow(lost.phi * 20.0)
    rounds = 0
    while not lost.admission.is_astray:
        gossip.round()
        rounds += 1
        assert rounds <= 12
        assert not any(replica.admission.is_astray for replica in others)
