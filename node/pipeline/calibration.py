"""How much longer transfers take than their links promise: learnt from iterations that went by a plan.

Links are measured one payload at a time. Among others a payload takes longer than its fair share of a line would have it:
connections begin slowly, and those that share a line drop each other's packets. Passes last what they should (docs/LOG.md). So a
planner compares what iterations took with its simulation of their plan, puts the whole difference down to the transfers, and
makes the next plan for links that are slower by as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from node.pipeline.case import Case
from node.pipeline.plan import Plan
from node.pipeline.variants import expected_s

__all__ = ["Ran", "calibrated", "transfer_factor"]

LEAST, MOST = 0.75, 1.5
"""Whatever else held up an iteration, links are not believed to be slower than this, nor faster."""
FIRST_STEP = 0.25
CLOSE = 0.01
"""As a share of the time: near enough."""
MAX_SIMULATIONS = 5


@dataclass(frozen=True, slots=True)
class Ran:
    """Iterations that went by one plan, and the seconds that they took, or their median."""

    case: Case
    plan: Plan
    seconds: float


def calibrated(case: Case, factor: float) -> Case:
    """The case with all transfers so many times as long."""
    return case.model_copy(
        update={
            "link_s": tuple(tuple(factor * each for each in row) for row in case.link_s),
            "uplink_s": tuple(factor * each for each in case.uplink_s),
            "downlink_s": tuple(factor * each for each in case.downlink_s),
        }
    )


def transfer_factor(ran: Sequence[Ran]) -> float:
    """By how much transfers have to be longer for the plans to take what they took, all together; 1 if nothing has run.

    The sum of simulated times is nearly linear in the factor, so a few steps of the secant method do; of the factors tried the one
    that comes nearest counts. That is 1 where transfers decide nothing, or a plan's microbatches would wait for each other for
    ever by our links. Each case is one before calibration.
    """
    took_s = sum(each.seconds for each in ran)
    tried: dict[float, float] = {}
    factor = 1.0
    while ran and factor not in tried and len(tried) < MAX_SIMULATIONS:
        simulated_s = sum(expected_s(calibrated(each.case, factor), each.plan) for each in ran)
        tried[factor] = simulated_s - took_s
        if simulated_s == math.inf or abs(tried[factor]) <= CLOSE * took_s:
            break
        factor = _next(tried)
    return min(tried, key=lambda each: abs(tried[each]), default=1.0)


def _next(tried: dict[float, float]) -> float:
    """What to try after these factors, by what each leaves over of the time; the last one again if that tells nothing."""
    *before, (factor, over_s) = tried.items()
    if not before:
        return factor + (FIRST_STEP if over_s < 0.0 else -FIRST_STEP)
    other, other_s = before[-1]
    slope = (over_s - other_s) / (factor - other)
    return factor if slope <= 0.0 else min(max(factor - over_s / slope, LEAST), MOST)
