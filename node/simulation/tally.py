"""What is counted while a swarm is simulated, and the summary made of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from averaging.averager import ExchangeResult
from averaging.replica import Outcome
from protocol.memory_links import Counts
from protocol.transport import Traffic

__all__ = ["Tally", "quantiles"]

_SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "max": 1.0}


@dataclass(slots=True)
class _Moments:
    """Sums over the replicas of one round."""

    total: Tensor
    """Σ φ, float64 [P]."""
    squares: float = 0.0
    """Σ mean(φ²)."""
    losses: float = 0.0
    count: int = 0


@dataclass(slots=True, kw_only=True)
class Tally:
    """Collects over all peers.

    Args:
        num_parameters: P.
    """

    num_parameters: int
    round_s: list[float] = field(default_factory=list)
    """Virtual seconds of every finished round, exchange included where it is waited for."""
    exchange_s: list[float] = field(default_factory=list)
    """Of every exchange that averaged."""
    attempts: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    population: Counter[str] = field(default_factory=Counter)
    """joined, left, crashed, skipped (rounds)."""
    sent_bytes: int = 0
    counts: Counts = field(default_factory=Counts)
    _moments: dict[int, _Moments] = field(default_factory=dict)

    def count_exchange(self, result: ExchangeResult, outcome: Outcome) -> None:
        """One exchange, with the verdict on what came."""
        kind = outcome.verdicts[result.remote.peer].kind if result.remote is not None else result.outcome
        self.outcomes[kind] += 1
        self.attempts += result.attempts
        if result.remote is not None:
            self.exchange_s.append(result.seconds)

    def count_replica(self, round: int, phi: Tensor, loss: float) -> None:
        """One peer's slow weights φ [P] after the outer step of `round`, and their loss."""
        moments = self._moments.setdefault(round, _Moments(torch.zeros(self.num_parameters, dtype=torch.float64)))
        exact = phi.double()
        moments.total += exact
        moments.squares += float(exact.square().mean())
        moments.losses += loss
        moments.count += 1

    def count_network(self, traffic: Traffic, counts: Counts, *, since: tuple[Traffic, Counts]) -> None:
        """What one peer has sent and asked for since its counters stood at `since`."""
        self.sent_bytes += traffic.sent_bytes - since[0].sent_bytes
        for name in Counts.__slots__:
            more = getattr(counts, name) - getattr(since[1], name)
            setattr(self.counts, name, getattr(self.counts, name) + more)

    def spread(self, round: int) -> float:
        """Root mean square distance of the replicas from their mean after `round`; the optimum's coordinates have size 1."""
        moments = self._moments[round]
        mean_square = float((moments.total / moments.count).square().mean())
        return math.sqrt(max(0.0, moments.squares / moments.count - mean_square))

    def mean_replica(self, round: int) -> Tensor:
        """Mean of the replicas after `round`, fp32 [P]."""
        moments = self._moments[round]
        return (moments.total / moments.count).float()

    def replica_loss(self, round: int) -> float:
        """Mean of the replicas' losses after `round`."""
        return self._moments[round].losses / self._moments[round].count

    @property
    def rounds(self) -> list[int]:
        """The rounds that somebody has finished."""
        return sorted(self._moments)

    def summary(self) -> dict[str, Any]:
        """Everything but the replicas, as JSON-able numbers."""
        num_rounds = max(1, len(self.round_s))
        num_exchanges = max(1, sum(self.outcomes.values()))
        averaged = self.outcomes["averaged"] + self.outcomes["clipped"]
        per_round = {name: getattr(self.counts, name) / num_rounds for name in Counts.__slots__}
        return {
            "round_s": quantiles(self.round_s),
            "exchange_s": quantiles(self.exchange_s),
            "exchange_cdf_s": np.quantile(self.exchange_s, np.linspace(0, 1, 21)).tolist() if self.exchange_s else [],
            "exchanges": dict(sorted(self.outcomes.items())),
            "success_share": averaged / num_exchanges,
            "population": dict(sorted(self.population.items())),
            "peer_rounds": len(self.round_s),
            "per_peer_and_round": {
                "sent_bytes": self.sent_bytes / num_rounds,
                "pairs_tried": self.attempts / num_rounds,
                **per_round,
            },
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, 90th and 95th percentile and maximum; empty for nothing."""
    if not values:
        return {}
    found = np.quantile(np.asarray(values), list(_SHARES.values()))
    return {"mean": float(np.mean(values)), **dict(zip(_SHARES, map(float, found), strict=True))}
