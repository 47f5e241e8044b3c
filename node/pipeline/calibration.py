"""How much longer transfers take than their links promise: learnt from iterations that went by a plan.

Links are measured one payload at a time. Among others a payload takes longer than its fair share of a line would have it:
connections begin slowly, and those that share a line drop each other's packets. Passes last what they should (docs/LOG.md). So a
planner compares what iterations took with its simulation of their plan, puts the whole difference down to the transfers, and
makes the next plan for links that are slower by as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from node.pipeline.case import Case
from node.pipeline.plan import Plan
from node.pipeline.variants import expected_s

__all__ = ["Ran", "calibrated", "transfer_factor"]

LEAST, MOST = 0.75, 2.0
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

    The sum of simulated times is nearly linear in the factor, so a few steps of the secant method do. Each case is one before
    calibration.
    """
    if not ran:
        return 1.0
    took_s = sum(each.seconds for each in ran)

    def excess_s(factor: float) -> float:
        return sum(expected_s(calibrated(each.case, factor), each.plan) for each in ran) - took_s

    before, factor = 1.0, 1.0
    before_s = excess_s(before)
    if abs(before_s) > CLOSE * took_s:
        factor += FIRST_STEP if before_s < 0.0 else -FIRST_STEP
    for _ in range(MAX_SIMULATIONS - 1):
        if factor == before:
            break
        now_s = excess_s(factor)
        slope = (now_s - before_s) / (factor - before)
        before, before_s = factor, now_s
        if abs(now_s) <= CLOSE * took_s or slope <= 0.0:
            break
        factor = min(max(factor - now_s / slope, LEAST), MOST)
    return factor
