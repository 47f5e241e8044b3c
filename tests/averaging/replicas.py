"""Replicas without a network, for the tests here: they train on noise, and exchanges always arrive."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from averaging.outer import Algorithm
from averaging.replica import Outcome, Replica, ReplicaConfig
from averaging.update import RemoteUpdate, Update
from protocol.ids import PeerId

__all__ = ["ALGORITHMS", "LOSSY", "NUMEL", "OPEN", "exchange", "mean_of", "meet", "noise", "received", "swarm", "train"]

NUMEL = 700  # two whole blocks of 256 and a tail
OPEN = ReplicaConfig(admission=None, delta_codec="fp32", slow_codec="fp32")
LOSSY = ReplicaConfig(admission=None, delta_codec="q8", slow_codec="bf16")
ALGORITHMS: tuple[Algorithm, ...] = ("local", "pair-average", "noloco", "diloco", "sparseloco")


def noise(seed: int, scale: float = 1.0, numel: int = NUMEL) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale


def swarm(num_peers: int, config: ReplicaConfig, *, equal: bool = True, numel: int = NUMEL) -> list[Replica]:
    return [Replica(noise(0 if equal else seed, 0.02, numel), config) for seed in range(num_peers)]


def received(update: Update, peer: int) -> RemoteUpdate:
    """What a partner holds after the exchange: its own copy."""
    return RemoteUpdate(
        peer=PeerId(f"peer{peer}"),
        round=update.round,
        tokens=update.tokens,
        delta=memoryview(bytearray(update.delta)),
        slow=memoryview(bytearray(update.slow)),
    )


def exchange(replicas: Sequence[Replica], *, tokens: Sequence[int] | None = None, round: int = 0) -> list[Outcome]:
    """All with all, everything delivered."""
    counts = tokens or [100] * len(replicas)
    updates = [
        received(replica.pack(round=round, tokens=count), number)
        for number, (replica, count) in enumerate(zip(replicas, counts, strict=True))
    ]
    return [replica.apply(updates[:own] + updates[own + 1 :]) for own, replica in enumerate(replicas)]


def train(replica: Replica, seed: int, scale: float = 1e-3) -> torch.Tensor:
    """Stands for inner steps; returns the progress made."""
    progress = noise(seed, scale, replica.theta.numel())
    replica.theta += progress
    return progress


def meet(
    replicas: Sequence[Replica], group: Sequence[int], generator: torch.Generator, *, round: int = 0
) -> list[Outcome]:
    """One round of random pairs within a group."""
    order = [group[place] for place in torch.randperm(len(group), generator=generator).tolist()]
    outcomes = []
    for first, second in zip(order[0::2], order[1::2], strict=True):
        updates = {n: received(replicas[n].pack(round=round, tokens=100), n) for n in (first, second)}
        outcomes.append(replicas[first].apply([updates[second]]))
        outcomes.append(replicas[second].apply([updates[first]]))
    return outcomes


def mean_of(replicas: Sequence[Replica]) -> torch.Tensor:
    """Mean φ, float64."""
    return torch.stack([replica.phi.double() for replica in replicas]).mean(0)
