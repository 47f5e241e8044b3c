"""Planning problems for the schedule benchmark: three published ones, and more of other kinds, drawn from a seed.

The published cases are SkipPipe's (arXiv 2502.19913): link times between cloud regions, and the iteration times that its code
reached on its own cost model. `prototype_iteration_s` is what our first annealer reached on the published partition.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Problem", "drawn_problems", "published_problems"]

FOLDER = Path(__file__).parent / "cases"
SLOTS, ROUNDS = 3, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A case and what others reached on it.

    Args:
        case: decoded JSON.
        reference_s: iteration time of SkipPipe's own planner.
        prototype_s: of our prototype, with the published partition.
        partition: the published partition.
    """

    case: dict[str, Any]
    reference_s: float | None = None
    prototype_s: float | None = None
    partition: Any = None


def published_problems() -> list[Problem]:
    """SkipPipe's three cases."""
    problems = []
    for name in ("small", "v1_default", "head_linkfix"):
        case = json.loads((FOLDER / f"{name}.json").read_text())
        reference_s, prototype_s = case["reference_iteration_s"]["skippipe"], case["prototype_iteration_s"]
        partition = case["reference_partition"]
        problems.append(Problem(case=case, reference_s=reference_s, prototype_s=prototype_s, partition=partition))
    return problems


def drawn_problems() -> list[Problem]:
    """Two regions with a thin line between them; 42 nodes and 8 stages; very unequal processors."""
    rng = np.random.default_rng(2026)
    return [
        Problem(case=_case("two_regions", (6, 4, 4, 4), 3, _regions(rng, [9, 9]))),
        Problem(case=_case("42_nodes_8_stages", (7, *[5] * 7), 6, _regions(rng, [6] * 7))),
        Problem(
            case=_case("unequal_compute", (4, 5, 5, 5, 5), 4, _regions(rng, [8, 8, 8]))
            | {"forward_s": [round(float(time_s), 3) for time_s in rng.lognormal(0.5, 0.8, 24)]}
        ),
    ]


def _case(name: str, stage_sizes: Sequence[int], path_length: int, link_s: list[list[float]]) -> dict[str, Any]:
    num_nodes = sum(stage_sizes)
    return {
        "name": name,
        "num_nodes": num_nodes,
        "stage_sizes": list(stage_sizes),
        "path_length": path_length,
        "slots_per_node": SLOTS,
        "rounds": ROUNDS,
        "forward_s": [1.5] * num_nodes,
        "backward_multiplier": 2.0,
        "loss_multiplier": 0.2,
        "gap_s": 0.05,
        "gap_first_s": 0.05,
        "link_s": link_s,
    }


def _regions(rng: np.random.Generator, sizes: Sequence[int]) -> list[list[float]]:
    """Seconds for 8 MB: 400 Mbit/s within a region, 20 to 100 between two, and up to 0.15 s of latency."""
    region = np.repeat(np.arange(len(sizes)), sizes)
    between = rng.uniform(20.0, 100.0, (len(sizes), len(sizes)))
    latency = rng.uniform(0.03, 0.15, (len(sizes), len(sizes)))
    rate = np.where(region[:, None] == region, 400.0, between[region[:, None], region])
    delay = np.where(region[:, None] == region, 0.005, latency[region[:, None], region])
    link = 8.0 * 8.0 / rate + delay
    np.fill_diagonal(link, 0.0)
    return [[round(float(time_s), 4) for time_s in row] for row in link]
