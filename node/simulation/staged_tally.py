"""What is counted while a swarm of stages is simulated: the fate of every microbatch, iterations, work, and who was there."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import Any, get_args

from node.pipeline.messages import Refusal
from node.simulation.tally import Tally, quantiles
from protocol.memory_links import Counts
from protocol.transport import Traffic

__all__ = ["StagedTally", "Trip"]


@dataclass(slots=True, kw_only=True)
class Trip:
    """One microbatch."""

    iteration: int
    counted: set[int] = field(default_factory=set)
    """Stages that have counted its gradient."""
    has_returned: bool = False
    was_refused: bool = False
    """Whether somebody did not take it, so that another way had to be found."""


@dataclass(slots=True)
class _Iteration:
    """What the peers say of one iteration."""

    peers: list[int]
    """Per stage, when the first peer ended it."""
    ended_s: float
    """When that was."""
    seconds: list[float] = field(default_factory=list)


class StagedTally:
    """Collects over all peers.

    Args:
        num_stages: S.
        num_parameters: of a stage's toy problem.
    """

    def __init__(self, *, num_stages: int, num_parameters: int) -> None:
        self.num_stages = num_stages
        self.averaging = [Tally(num_parameters=num_parameters) for _ in range(num_stages)]
        """Rounds and exchanges of each stage."""
        self.population: Counter[str] = Counter()
        """joined, left, crashed, restarted (a stage whose last replica was gone begins anew)."""
        self.double_counts = 0
        """Gradients that a stage counted although it had them; none, if all is well."""
        self.overdue = 0
        """Iterations of one peer that the deadline ended."""
        self.failures: Counter[str] = Counter()
        """Why peers did not take tasks."""
        self.outcomes: Counter[str] = Counter()
        """Of exchanges."""
        self.num_visits = [0] * num_stages
        self.busy_s = [0.0] * num_stages
        self.lived_s = [0.0] * num_stages
        self.network: Counter[str] = Counter()
        self.known_peers: list[int] = []
        """By a peer, itself included, at an iteration's end."""
        self._trips: dict[int, Trip] = {}
        self._iterations: dict[int, _Iteration] = {}

    # ---- microbatches; their numbers are drawn from so many that no two are alike

    def start(self, number: int, iteration: int) -> None:
        """A microbatch leaves its origin."""
        self._trips[number] = Trip(iteration=iteration)

    def count_visit(self, number: int, stage: int) -> None:
        """A stage has counted its gradient; stage 0 is the last to."""
        trip = self._trips[number]
        self.double_counts += stage in trip.counted
        trip.counted.add(stage)
        trip.has_returned |= stage == 0
        self.num_visits[stage] += 1

    def count_failure(self, number: int, reason: str) -> None:
        """Somebody did not take a task of that microbatch."""
        self.failures[reason if reason in (*get_args(Refusal), "too slow") else "unreachable"] += 1
        if number in self._trips:
            self._trips[number].was_refused = True

    # ---- peers

    def count_iteration(self, number: int, *, seconds: float, peers: list[int], num_known: int, now_s: float) -> None:
        """One peer, which knows of so many, has ended an iteration, and these are there now."""
        self.known_peers.append(num_known)
        self._iterations.setdefault(number, _Iteration(peers, now_s)).seconds.append(seconds)

    def count_network(self, traffic: Traffic, counts: Counts) -> None:
        """What one peer has sent and asked for."""
        self.network["sent_bytes"] += traffic.sent_bytes
        for name in Counts.__slots__:
            self.network[name] += getattr(counts, name)

    def count_work(self, stage: int, *, busy_s: float, lived_s: float) -> None:
        """One peer has held a stage so long, and computed so much of it."""
        self.busy_s[stage] += busy_s
        self.lived_s[stage] += lived_s

    # ---- result

    def summary(self, *, microbatch_tokens: int, start_s: float) -> dict[str, Any]:
        """Everything as JSON-able numbers.

        Args:
            microbatch_tokens: B·T.
            start_s: when the first iteration could begin.
        """
        fates = _fates(list(self._trips.values()))
        seconds = [each for iteration in self._iterations.values() for each in iteration.seconds]
        end_s = max((iteration.ended_s for iteration in self._iterations.values()), default=start_s)
        tokens = fates["returned"] * microbatch_tokens
        return {
            "iteration_s": quantiles(seconds),
            "peer_iterations": len(seconds),
            "overdue": self.overdue,
            "microbatches": fates,
            "double_counts": self.double_counts,
            "visits_per_microbatch": self._mean_visits(),
            "known_peers": quantiles(self.known_peers),
            "tokens": tokens,
            "tokens_per_s": tokens / (end_s - start_s) if end_s > start_s else 0.0,
            "failures": dict(self.failures.most_common()),
            "exchanges": dict(sorted(self.outcomes.items())),
            "population": dict(sorted(self.population.items())),
            "per_peer_and_iteration": {kind: number / max(1, len(seconds)) for kind, number in self.network.items()},
            "by_stage": self._by_stage(),
            "by_iteration": self._by_iteration(),
            "by_round": self._by_round(),
        }

    def _mean_visits(self) -> float:
        """Stages that a microbatch has visited which came back; fewer than the path's length where some had to be left out."""
        visits = [len(trip.counted) for trip in self._trips.values() if trip.has_returned]
        return sum(visits) / len(visits) if visits else 0.0

    def _by_round(self) -> dict[str, list[float]]:
        """How far the replicas of a stage are apart, root mean square over stages."""
        rounds = sorted({round for stage in self.averaging for round in stage.rounds})
        spreads = [[stage.spread(round) for stage in self.averaging if round in stage.rounds] for round in rounds]
        means = [math.sqrt(sum(spread * spread for spread in each) / len(each)) for each in spreads]
        return {"round": list(rounds), "spread": means}

    def _by_stage(self) -> dict[str, list[float]]:
        counts = list(zip(*(iteration.peers for iteration in self._iterations.values()), strict=True))
        return {
            "stage": list(range(self.num_stages)),
            "mean_peers": [sum(each) / len(each) for each in counts] or [0.0] * self.num_stages,
            "least_peers": [min(each) for each in counts] or [0] * self.num_stages,
            "visits": list(self.num_visits),
            "utilisation": [
                busy_s / lived_s if lived_s else 0.0 for busy_s, lived_s in zip(self.busy_s, self.lived_s, strict=True)
            ],
        }

    def _by_iteration(self) -> dict[str, list[Any]]:
        trips = defaultdict(list)
        for trip in self._trips.values():
            trips[trip.iteration].append(trip)
        numbers = sorted(self._iterations)
        fates = [_fates(trips[number]) for number in numbers]
        return {
            "iteration": numbers,
            "ended_s": [self._iterations[number].ended_s for number in numbers],
            "median_s": [median(self._iterations[number].seconds) for number in numbers],
            **{kind: [each[kind] for each in fates] for kind in ("sent", "returned", "lost", "rerouted")},
            "peers": [self._iterations[number].peers for number in numbers],
        }


def _fates(trips: list[Trip]) -> dict[str, int]:
    """How many were sent, came back, did not, and came back after somebody had not taken them."""
    returned = [trip for trip in trips if trip.has_returned]
    return {
        "sent": len(trips),
        "returned": len(returned),
        "lost": len(trips) - len(returned),
        "rerouted": sum(trip.was_refused for trip in returned),
    }
