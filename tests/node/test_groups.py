"""Whole swarms in which every round is an exchange with everybody, not with one partner."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.demo_check import relative_spread
from node.simulated import run_swarm
from protocol.virtual_time import run_virtual
from tests.node.memory_swarm import phi
from tests.node.runs import tiny_run


@pytest.mark.parametrize("algorithm", ["diloco", "sparseloco"])
def test_everybody_exchanges_with_everybody(tmp_path: Path, algorithm: str) -> None:
    signed, store = tiny_run(tmp_path, sync__algorithm=algorithm)
    assert signed.manifest.sync.group == "all"
    peers, summaries = run_virtual(run_swarm(signed, store, 3, seed=0))
    rounds = signed.manifest.sync.total_rounds
    assert [summary.exchanges_ok for summary in summaries] == [2 * rounds] * 3
    assert relative_spread([phi(peer) for peer in peers]) < 0.5
    for summary in summaries:
        assert summary.val_loss_start is not None
        assert summary.val_loss_end is not None
        assert summary.val_loss_end < summary.val_loss_start
