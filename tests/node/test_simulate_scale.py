"""The scaling benchmark on tiny swarms, and its models against what is known of them."""

from __future__ import annotations

import pytest

from tests.benchmarks.scale import growth, losses, pair_times, round_times, tree_time


def test_without_spread_a_tree_takes_two_latencies_per_level() -> None:
    assert tree_time(1024, 0.0) == pytest.approx(20.0)
    assert tree_time(16, 0.0) == pytest.approx(8.0)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 2.0])
def test_the_bare_pair_matches_the_paper_s_closed_form(ratio: float) -> None:
    times = pair_times(ratio)
    assert times["pair_bare"] == pytest.approx(times["pair_formula"], rel=0.02)
    assert times["pair_one_message"] == pytest.approx(times["pair_bare"] / 2)


def test_the_ratio_at_1024_peers_is_the_published_one() -> None:
    ratios = [tree_time(1024, r, trials=60) / pair_times(r)["pair_bare"] for r in (0.0, 2.0)]
    assert ratios[0] == pytest.approx(10.0, rel=0.01)
    assert ratios[1] == pytest.approx(31.0, rel=0.06)


def test_rows_are_complete() -> None:
    rows = round_times((64,), (1.0,), min_sampled=64)
    assert rows[0]["tree_over_real"] == pytest.approx(rows[0]["tree"] / rows[0]["pair_real"]["mean"])
    assert 6.0 < rows[0]["pair_real"]["p50"] < rows[0]["pair_real"]["p95"]
    assert rows[0]["real_success_share"] > 0.9


def test_loss_and_growth_rows() -> None:
    sound, lossy = losses(16, 3, (0.0, 0.5))
    assert sound["measured_loss"] == 0.0
    assert lossy["measured_loss"] == pytest.approx(0.5, abs=0.2)
    assert len(lossy["spread"]) == 3
    small, large = growth((8, 24))
    assert large["messages"] < 2 * small["messages"]
    assert large["dht_gets"] < 2 * small["dht_gets"]
