"""A whole run that averages a random share of the weights every few steps, from its manifest to the final averaging."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from node.simulation.demo import run_swarm
from protocol.virtual_time import run_virtual
from tests.node.memory_swarm import phi
from tests.node.runs import tiny_run


@pytest.mark.parametrize("algorithm", ["pair-average", "noloco"])
def test_peers_that_average_random_shares_learn_together(tmp_path: Path, algorithm: str) -> None:
    settings = {"sync__algorithm": algorithm, "sync__fragments": 2, "sync__fragment_choice": "random"}
    signed, store = tiny_run(tmp_path, **settings, sync__total_rounds=9, sync__inner_steps=2)
    sync = signed.manifest.sync
    assert (sync.max_lag_rounds, sync.slow_codec, sync.fragment_choice) == (0, "lattice", "random")
    peers, summaries = run_virtual(run_swarm(signed, store, 3, seed=0))
    notes = list(chain.from_iterable(peer.progress.recent for peer in peers))
    assert sum(summary.exchanges_ok for summary in summaries) >= 6
    assert not any(note.outcome in ("refused", "lost") for note in notes)
    models = torch.stack([phi(peer) for peer in peers])
    assert float(torch.cdist(models, models).max() / models[0].norm()) < sync.consolidation_tolerance
    assert all((summary.val_loss_end or 9.0) < (summary.val_loss_start or 0.0) for summary in summaries)
