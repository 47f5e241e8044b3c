"""The scaling benchmark on tiny swarms, and its models against what is known of them."""

from __future__ import annotations

import pytest

from tests.benchmarks import report_plots, report_tables
from tests.benchmarks.scale import exchange_times, measure, pair_times, tree_time


def test_without_spread_a_tree_takes_two_latencies_per_level() -> None:
    assert tree_time(1024, 0.0) == pytest.approx(20.0)
    assert tree_time(16, 0.0) == pytest.approx(8.0)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 2.0])
def test_the_bare_pair_matches_the_paper_s_closed_form(ratio: float) -> None:
    times = pair_times(ratio)
    assert times["bare_pair"] == pytest.approx(times["paper_pair"], rel=0.02)


def test_the_ratio_at_1024_peers_is_the_published_one() -> None:
    ratios = [tree_time(1024, r, trials=60) / pair_times(r)["bare_pair"] for r in (0.0, 2.0)]
    assert ratios[0] == pytest.approx(10.0, rel=0.01)
    assert ratios[1] == pytest.approx(31.0, rel=0.06)


def test_a_real_exchange_takes_its_messages_and_nearly_all_succeed() -> None:
    rows = exchange_times(64, 1.0, min_sampled=64)
    assert 6 * 0.05 < rows["round_time"]["pair_s"] < rows["round_time"]["pair_p95_s"]
    assert rows["tree_over_pair"]["pair"] == pytest.approx(rows["round_time"]["tree_s"] / rows["round_time"]["pair_s"])
    assert rows["averaged_share"] > 0.9


def test_the_whole_result_is_what_the_report_shows() -> None:
    result = measure((8, 32), (0.5,), (0.0, 0.5), loss_peers=16, loss_rounds=3)
    assert len(result["spread"]["0.5"]) == 3
    assert result["spread"]["0.5"][-1] > result["spread"]["0.0"][-1]
    small, large = result["messages"]["8"], result["messages"]["32"]
    assert large["messages"] < 2 * small["messages"]
    assert large["dht_gets"] < 2 * small["dht_gets"]
    pictures = {picture.stem: picture.panels for picture in report_plots.PICTURES["scale"](result)}
    assert pictures["scale-round-time"][0].lines["tree s"][0][:2] == (8.0, result["round_time"]["0.5"]["8"]["tree_s"])
    assert set(pictures["scale-spread"][0].lines) == {"0.0", "0.5"}
    assert set(pictures["scale-messages"][0].lines) >= {"messages", "dht gets"}
    assert any("| 32 |" in block and "tree s" in block for block in report_tables.render_tables(result))
