from __future__ import annotations

import math

import pytest
import torch

from averaging.consolidation import (
    SKETCH_BYTES,
    Agreement,
    Consolidation,
    agreeing_partners,
    num_rounds,
    sketch,
    sketched_distance,
)
from averaging.outer import OuterConfig
from averaging.replica import Replica, ReplicaConfig
from averaging.update import RemoteUpdate
from protocol.ids import PeerId
from tests.averaging.gossip import Gossip

ANN, BOB, CYD = PeerId("ann"), PeerId("bob"), PeerId("cyd")
TOLERANCE = 1e-3


def trained(num_peers: int, *, seed: int = 0) -> Gossip:
    gossip = Gossip(num_peers, rate=0.02, seed=seed)
    for _ in range(20):
        gossip.round()
    return gossip


def sent(consolidation: Consolidation, number: int, *, round: int, shift: float = 0.0) -> RemoteUpdate:
    update = consolidation.pack(round)
    slow = torch.frombuffer(bytearray(update.slow), dtype=torch.float32) + shift
    return RemoteUpdate(
        peer=PeerId(f"peer{number}"),
        round=round,
        tokens=0,
        delta=memoryview(bytearray(update.delta)),
        slow=memoryview(bytearray(slow.numpy().tobytes())),
    )


def meet_at_random(gossip: Gossip, rounds: int, *, liars: dict[int, float] | None = None) -> list[Consolidation]:
    """Random pairs; liars add a constant to what they send."""
    liars = liars or {}
    sides = [Consolidation(replica, tolerance=TOLERANCE) for replica in gossip.replicas]
    generator = torch.Generator().manual_seed(7)
    for round in range(rounds):
        order = torch.randperm(len(sides), generator=generator).tolist()
        for first, second in zip(order[0::2], order[1::2], strict=False):
            updates = [sent(sides[n], n, round=round, shift=liars.get(n, 0.0)) for n in (first, second)]
            sides[first].apply(updates[1])
            sides[second].apply(updates[0])
    for side in sides:
        side.finish()
    return sides


def stacked(gossip: Gossip, numbers: list[int]) -> torch.Tensor:
    return torch.stack([gossip.replicas[number].phi for number in numbers])


def test_agreement_takes_two_different_partners_in_a_row() -> None:
    agreement = Agreement(TOLERANCE)
    assert not agreement.is_reached(3)
    for partner, distance, expected in [
        (ANN, 1e-4, False),
        (ANN, 1e-4, False),
        (BOB, 2e-3, False),
        (CYD, 1e-4, False),
        (BOB, 1e-4, True),
        (ANN, 1e-3, False),
    ]:
        agreement.met(partner, distance)
        assert agreement.is_reached(3) == expected
        assert agreement.distance == distance


@pytest.mark.parametrize("num_others", [0, 1])
def test_with_one_other_one_meeting_within_the_tolerance_is_enough(num_others: int) -> None:
    agreement = Agreement(TOLERANCE)
    assert not agreement.is_reached(num_others), "nothing is known before the first meeting"
    agreement.met(ANN, 1e-4)
    assert agreement.is_reached(num_others)


def test_pair_averaging_ends_from_its_present_weights() -> None:
    outer = OuterConfig(algorithm="pair-average")
    replica = Replica(torch.zeros(4 * 4096), ReplicaConfig(outer=outer, slow_codec="fp32", fragments=4))
    for round in range(4):  # each fragment's last round lies some rounds back
        replica.theta.add_(1.0)
        replica.pack(round=round, tokens=1)
        replica.apply([])
    Consolidation(replica, tolerance=TOLERANCE).finish()
    assert torch.equal(replica.theta, torch.full((4 * 4096,), 4.0))


def test_rounds_are_bounded_by_the_logarithm() -> None:
    assert [num_rounds(peers) for peers in (1, 2, 8, 16, 1024)] == [18, 18, 30, 36, 72]
    assert [num_rounds(peers) for peers in (3, 5, 7)] == [33, 33, 34], "each sits out one round of so many"


@pytest.mark.parametrize("num_peers", [2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_pairs_end_with_one_model_near_the_mean(num_peers: int, seed: int) -> None:
    gossip = trained(num_peers, seed=seed)
    before = stacked(gossip, list(range(num_peers)))
    sides = meet_at_random(gossip, num_rounds(num_peers))
    after = stacked(gossip, list(range(num_peers)))
    spread = (before - before.mean(0)).norm(dim=1).max()
    assert torch.cdist(after, after).max() < TOLERANCE * after.norm(dim=1).min()
    assert (after.mean(0) - before.mean(0)).norm() < 0.5 * spread
    assert all(side.agreement.is_reached(num_peers - 1) for side in sides)
    for replica in gossip.replicas:
        assert torch.equal(replica.theta, replica.phi)
        assert not replica.momentum.any()


def test_a_pair_takes_the_exact_mean() -> None:
    gossip = trained(2)
    expected = stacked(gossip, [0, 1]).mean(0)
    meet_at_random(gossip, 6)
    torch.testing.assert_close(gossip.replicas[0].phi, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [0.01, 0.1, 1e6, math.nan, math.inf])
def test_a_liar_moves_the_result_by_less_than_the_usual_distance(shift: float) -> None:
    gossip = trained(6)
    honest = list(range(5))
    usual = max(gossip.replicas[number].admission.usual_distance for number in honest)
    before = stacked(gossip, honest).mean(0)
    meet_at_random(gossip, num_rounds(6), liars={5: shift})
    after = stacked(gossip, honest)
    assert (after.mean(0) - before).norm() < 0.6 * usual
    assert torch.cdist(after, after).max() < TOLERANCE * after.norm(dim=1).min()


def test_stopping_in_the_middle_leaves_a_whole_model() -> None:
    gossip = trained(4)
    before = stacked(gossip, [0, 1, 2, 3])
    meet_at_random(gossip, 1)
    after = stacked(gossip, [0, 1, 2, 3])
    assert after.isfinite().all()
    assert (after - after.mean(0)).norm() < (before - before.mean(0)).norm()


def test_one_that_met_nobody_in_the_whole_run_joins_in() -> None:
    gossip = Gossip(3, rate=0.02)
    for _ in range(20):
        gossip.round([[0, 1], [2]])
    meet_at_random(gossip, num_rounds(3))
    after = stacked(gossip, [0, 1, 2])
    assert torch.cdist(after, after).max() < TOLERANCE * after.norm(dim=1).min()


def test_two_cliques_can_not_both_agree() -> None:
    assert [agreeing_partners(others) for others in (0, 1, 2, 3, 5, 6, 7, 15, 1023)] == [1, 1, 2, 2, 3, 3, 4, 5, 11]
    for num_peers in range(2, 9):
        clique = 1 + agreeing_partners(num_peers - 1)
        assert 2 * clique > num_peers


@pytest.mark.parametrize("num_weights", [5, 4096, (1 << 20) + 3])
def test_sketches_tell_how_far_two_models_are_apart(num_weights: int) -> None:
    generator = torch.Generator().manual_seed(3)
    model = torch.randn(num_weights, generator=generator)
    told = sketch(model)
    assert len(told) == SKETCH_BYTES
    assert told == sketch(model.clone())
    squares = []
    for _ in range(30):
        change = torch.randn(num_weights, generator=generator) * 1e-3
        squares.append((sketched_distance(told, sketch(model + change)) / float(change.norm())) ** 2)
    assert 0.7 < sum(squares) / len(squares) < 1.3


def test_a_meeting_changes_the_sketch() -> None:
    gossip = trained(2)
    sides = [Consolidation(replica, tolerance=1e-6) for replica in gossip.replicas]
    before = [side.sketch() for side in sides]
    updates = [sent(side, number, round=0) for number, side in enumerate(sides)]
    assert not sides[0].is_near(*before)
    sides[0].apply(updates[1])
    sides[1].apply(updates[0])
    assert before[0] != sides[0].sketch()
    assert sides[0].is_near(sides[0].sketch(), sides[1].sketch())


def test_what_is_no_sketch_is_near_nobody() -> None:
    side = Consolidation(trained(2).replicas[0], tolerance=TOLERANCE)
    side.pack(0)
    own = side.sketch()
    assert side.is_near(own, own)
    assert not side.is_near(own, b"\xff" * SKETCH_BYTES)  # eight times NaN
