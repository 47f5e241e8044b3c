"""Replicas that go the same way by different routes, for the tests of the routes."""

from __future__ import annotations

import torch
from torch import Tensor

from averaging.admission import AdmissionConfig
from averaging.outer import OuterConfig
from averaging.replica import Outcome, Replica, ReplicaConfig
from averaging.update import RemoteUpdate, Update
from protocol.ids import PeerId

__all__ = ["CODECS", "NUMEL", "PAIR", "THETA", "config", "differ_by", "received", "trained"]

CODECS = ("fp32", "bf16", "q8", "q4", "lattice")
NUMEL = 3 * 4096 + 100
"""Whole blocks, and one that is not full."""
ROUNDS = 6


PAIR = OuterConfig(algorithm="pair-average")
THETA = OuterConfig(algorithm="noloco", theta_only=True, alpha=0.5, beta=0.7, gamma=0.7)


def config(codec: str, *, compiled: bool, **more: object) -> ReplicaConfig:
    defaults: dict[str, object] = {
        "admission": AdmissionConfig(newcomer_weight=1.0),
        "slow_codec": codec,
        "outer": PAIR,
    }
    return ReplicaConfig(compiled=compiled, **(defaults | more))  # type: ignore[arg-type]


def received(update: Update, name: str) -> RemoteUpdate:
    slow = memoryview(bytearray(update.slow))
    return RemoteUpdate(peer=PeerId(name), round=update.round, tokens=update.tokens, delta=update.delta, slow=slow)


def trained(
    codec: str, *, compiled: bool, members: int = 2, late_steps: bool = False, numel: int = NUMEL, **more: object
) -> tuple[list[Replica], list[Outcome]]:
    """Replicas that drift apart at random and average with everybody in every round."""
    random = torch.Generator().manual_seed(3)
    start = torch.randn(numel, generator=random) * 0.02
    replicas = [Replica(start.clone(), config(codec, compiled=compiled, **more)) for _ in range(members)]
    outcomes = []
    for round in range(ROUNDS):
        for replica in replicas:
            replica.theta.add_(torch.randn(numel, generator=random), alpha=1e-4)
        updates = [replica.pack(round=round, tokens=10) for replica in replicas]
        sent = [received(update, str(index)) for index, update in enumerate(updates)]
        for index, replica in enumerate(replicas):
            if late_steps:
                replica.theta.add_(torch.randn(numel, generator=random), alpha=1e-5)
            others = [each for each in sent if each.peer != str(index)]
            outcomes.append(replica.apply(others, steps_since_pack=int(late_steps)))
    return replicas, outcomes


def differ_by(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
