"""Plan a case: construct, improve in several processes at once, bound.

The processes share nothing: annealing from other seeds, of which the best counts, gains more than any exchange between them
would.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

from node.pipeline.bounds import lower_bound
from node.pipeline.case import Case
from node.pipeline.construct import construct
from node.pipeline.improve import Annealing, improve
from node.pipeline.plan import Dispatch, Plan
from node.pipeline.replay import Done, replay
from node.pipeline.rules import violations
from node.pipeline.variants import expected_s
from protocol.errors import UserError

__all__ = ["Solution", "replan", "solve"]

_SCOUTS = 3
_FIRST_PLANS = 2
_SCOUTING_SHARE = 0.3
"""Of the time, for short runs from several first plans; the best of them is then improved with the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A plan and what it is worth.

    Attributes:
        plan: the best plan found.
        iteration_s: its simulated iteration.
        bound_s: no plan with its partition takes less.
        solver_s: wall time of the search, the bound apart.
        num_evaluations: iterations that were simulated.
        timeline: every task of the iteration.
    """

    plan: Plan
    iteration_s: float
    bound_s: float
    solver_s: float
    num_evaluations: int
    timeline: list[Done]

    @property
    def gap(self) -> float:
        """How much of the iteration time may be above the best possible, as a share of the bound."""
        return self.iteration_s / self.bound_s - 1.0

    def utilisation(self, case: Case) -> list[float]:
        """Share of the iteration in which each node works."""
        busy = [0.0] * case.num_nodes
        for task in self.timeline:
            busy[task.node] += task.end_s - task.start_s
        return [time_s / self.iteration_s for time_s in busy]


def solve(case: Case, *, seconds: float, seed: int = 0, processes: int | None = None) -> Solution:
    """Search for a good plan.

    Args:
        case: the problem.
        seconds: wall time of the search.
        seed: of all draws.
        processes: how many search at once; as many as there are processors by default, and none but this one if 1.

    Raises:
        UserError: the nodes can not be visited often enough for any plan.
    """
    begun_s = time.perf_counter()
    ends_at = time.time() + seconds
    number = processes or os.cpu_count() or 1
    first = [construct(case, seed=seed + scout) for scout in range(_SCOUTS * number)]
    jobs = [_Job(case, tuple(first[index::number]), ends_at, seed + index) for index in range(number)]
    if number == 1:
        found = [_search(jobs[0])]
    else:
        with ProcessPoolExecutor(number, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(_search, jobs))
    solver_s = time.perf_counter() - begun_s
    plan, _ = min(found, key=lambda each: expected_s(case, each[0]))
    iteration_s, timeline = expected_s(case, plan), replay(case, plan)[1]
    if iteration_s == math.inf:
        raise UserError(
            f"{case.name}: in every plan found microbatches wait for each other's slots for ever; raise slots_per_node"
        )
    assert not violations(case, plan), "every move keeps the rules"
    return Solution(
        plan=plan,
        iteration_s=iteration_s,
        bound_s=lower_bound(case, plan),
        solver_s=solver_s,
        num_evaluations=sum(count for _, count in found),
        timeline=timeline,
    )


def replan(
    case: Case,
    incumbent: Plan | None,
    *,
    dispatch: Dispatch,
    seed: int,
    seconds: float,
    max_evaluations: int,
) -> Plan:
    """Plan a swarm that is at work: quick searches in this process, from new plans, and from the present one if there is one.

    Args:
        incumbent: keeps the rules of `case`.
        dispatch: how the peers choose among waiting tasks.
        seed: another one each time, so that paths change from plan to plan.
        seconds, max_evaluations: whichever comes first; a search ended by the latter is repeatable.

    Raises:
        UserError: there is no plan.
    """
    new = [construct(case, seed=first) for first in range(seed, seed + _FIRST_PLANS)]
    starts = [replace(plan, dispatch=dispatch) for plan in (new if incumbent is None else [*new, incumbent])]
    share = Annealing(seconds=seconds / len(starts), seed=seed, max_evaluations=max(1, max_evaluations // len(starts)))
    found = [improve(case, start, share)[0] for start in starts]
    return min(found, key=lambda plan: expected_s(case, plan))


@dataclass(frozen=True, slots=True)
class _Job:
    """What one process does.

    Args:
        first: plans to start from.
        ends_at: clock time, the same for all processes.
    """

    case: Case
    first: tuple[Plan, ...]
    ends_at: float
    seed: int


def _search(job: _Job) -> tuple[Plan, int]:
    """Short runs from every first plan, then a long one from the best of them."""
    seconds = max(0.0, job.ends_at - time.time())
    num_evaluations = 0
    scouts = []
    for number, plan in enumerate(job.first):
        found, count = improve(
            job.case,
            plan,
            Annealing(seconds=seconds * _SCOUTING_SHARE / len(job.first), seed=job.seed + number),
        )
        scouts.append(found)
        num_evaluations += count
    best = min(scouts, key=lambda each: replay(job.case, each)[0])
    last, count = improve(
        job.case, best, Annealing(seconds=max(0.0, job.ends_at - time.time()), seed=~job.seed & 0xFFFF)
    )
    return last, num_evaluations + count
