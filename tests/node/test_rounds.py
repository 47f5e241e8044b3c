"""The batch follows the machine's speed, within the run's limits."""

from __future__ import annotations

import pytest

from node.rounds import RESIZE_LIMIT, sequences_for
from protocol.manifest import Manifest
from tests.protocol.samples import manifest

TARGET_S = 60.0


def limited(smallest: int = 1, largest: int = 64) -> Manifest:
    inner = {"lr": 1e-3, "sequence_tokens": 64, "min_sequences": smallest, "max_sequences": largest}
    return manifest(inner=inner, sync={"round_target_s": TARGET_S})


def test_a_slow_round_shrinks_the_batch_in_proportion() -> None:
    assert sequences_for(limited(), now=20, round_s=TARGET_S * 1.25) == 16


def test_a_fast_round_grows_the_batch_in_proportion() -> None:
    assert sequences_for(limited(), now=20, round_s=TARGET_S / 1.5) == 30


@pytest.mark.parametrize("round_s", [TARGET_S / 1.09, TARGET_S, TARGET_S * 1.09])
def test_noise_changes_nothing(round_s: float) -> None:
    assert sequences_for(limited(), now=20, round_s=round_s) == 20


@pytest.mark.parametrize("round_s", [0.0, 1e-9, 1.0])
def test_growth_per_round_is_limited(round_s: float) -> None:
    assert sequences_for(limited(), now=8, round_s=round_s) == 8 * RESIZE_LIMIT


def test_a_pause_of_the_machine_costs_at_most_half_of_the_batch() -> None:
    assert sequences_for(limited(), now=8, round_s=1e6) == 8 / RESIZE_LIMIT


@pytest.mark.parametrize(
    ("now", "round_s", "expected"), [(12, 10.0, 16), (5, 600.0, 4), (1, 600.0, 4), (40, TARGET_S, 16)]
)
def test_the_manifest_limits_hold(now: int, round_s: float, expected: int) -> None:
    assert sequences_for(limited(4, 16), now=now, round_s=round_s) == expected


def test_repeated_it_settles_at_the_target() -> None:
    sequences = 1
    for _ in range(10):
        sequences = sequences_for(limited(), now=sequences, round_s=2.0 * sequences)  # 2 s per sequence
    assert abs(2.0 * sequences - TARGET_S) <= 0.1 * TARGET_S
