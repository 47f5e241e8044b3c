"""Our outer optimizer against torchft's DiLoCo: momentum, fragments, blending. torchft_reference.py made the numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from averaging.outer import OuterConfig
from averaging.replica import Replica, ReplicaConfig
from tests.averaging.replicas import exchange
from tests.averaging.torchft_reference import DATA, INNER_LR, INNER_STEPS, NUM_WEIGHTS, SETTINGS, start_and_targets

LAYER_NUMEL = 4096  # one stripe of a fragment; a layer's 8 weights repeat in it
REFERENCE = json.loads(DATA.read_text())


def spread_out(layers: torch.Tensor) -> torch.Tensor:
    """[layers, 8] → [layers · 4096]."""
    return layers.repeat(1, LAYER_NUMEL // NUM_WEIGHTS).flatten()


def config(setting: dict[str, Any]) -> ReplicaConfig:
    outer = OuterConfig(
        algorithm="diloco",
        momentum="nesterov" if setting["nesterov"] else "heavy-ball",
        alpha=setting["momentum"],
        beta=setting["lr"],
        gamma=0.0,
    )
    return ReplicaConfig(
        outer=outer, admission=None, delta_codec="fp32", fragments=setting["fragments"], blend=setting["blend"]
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_trajectories_are_torchft_s(name: str) -> None:
    start, targets = start_and_targets(SETTINGS[name]["fragments"])
    replicas = [Replica(spread_out(start), config(SETTINGS[name])) for _ in targets]
    for round, expected in enumerate(REFERENCE[name]):
        for replica, target in zip(replicas, targets, strict=True):
            for _ in range(INNER_STEPS):
                replica.theta.sub_(replica.theta - spread_out(target), alpha=INNER_LR)
        exchange(replicas, round=round)
        for replica, layers in zip(replicas, expected, strict=True):
            torch.testing.assert_close(replica.theta, spread_out(torch.tensor(layers)), rtol=1e-5, atol=1e-6)
