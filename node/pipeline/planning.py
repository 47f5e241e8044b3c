"""Planning in a live swarm, without a coordinator.

In every stretch of `PLAN_ITERATIONS` iterations there is a new plan, followed as soon as it is there. The peer whose turn it is
comes out of a hash that nobody can choose; if nothing is heard of its plan, the next two in line make one, some iterations later.
It plans what the signed records tell (node/pipeline/live_case.py) and the last plan's iterations took
(node/pipeline/calibration.py), signs, and names the plan's number in its own record; others fetch it from anybody who holds it
(node/pipeline/plan_book.py) and check everything (node/pipeline/published.py). No plan is needed: without one peers route greedily,
and where a plan does not fit the swarm any more, the greedy rule mends the path.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from statistics import median

from node.compute import Compute
from node.pipeline.calibration import Ran, calibrated, transfer_factor
from node.pipeline.case import Case
from node.pipeline.live_case import live_case
from node.pipeline.plan import Plan
from node.pipeline.plan_book import PlanBook
from node.pipeline.published import (
    DISPATCH,
    MAX_PLAN_BYTES,
    PLAN_ITERATIONS,
    PlanDocument,
    SignedPlan,
    plan_number,
    planners,
)
from node.pipeline.solver import replan
from node.pipeline.variants import expected_s
from protocol.errors import UserError
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.records import PeerRecord

__all__ = ["Planning", "search"]

SEARCH_S = 4.0
PEER_ID_BYTES, PLACE_BYTES, HEADER_BYTES = 56, 2, 512
"""Of a plan: per member, per place on a path, and once."""
LEAST_ITERATIONS = 3
"""By one plan, before what they took is believed."""
MAX_EVALUATIONS, MAX_TASKS = 20_000, 20_000_000
"""Iterations, and tasks of them, that are simulated in one search; bounds of it where the clock is not one."""


class Planning:
    """One stage peer's turns as planner.

    Args:
        manifest: of the run.
        book: where plans are kept.
        payload_bytes: of a microbatch's activations.
        compute: its `run_aside` searches.
    """

    def __init__(
        self, manifest: Manifest, *, book: PlanBook, payload_bytes: int, identity: Identity, compute: Compute
    ) -> None:
        self._run, self._spec, self._payload_bytes = manifest.run_id, manifest.pipeline, payload_bytes
        self._book, self._identity, self._own, self._compute = book, identity, identity.peer_id, compute
        self._took_s: list[float] = []
        self._took_by = 0

    def note_iteration(self, number: int, seconds: float) -> None:
        """What an iteration took, without the inner step, that went by plan `number` from its beginning; 0: by none."""
        if number != self._took_by:
            self._took_by, self._took_s = number, []
        self._took_s.append(seconds)

    async def look(self, records: Mapping[PeerId, PeerRecord], iteration: int) -> None:
        """Fetch a newer plan, or make one if that is our turn.

        Args:
            records: of all live stage peers, our own included.
            iteration: the present one.
        """
        number = plan_number(iteration)
        await self._book.fetch(records, at_most=number)
        elected = planners(records, run=self._run, number=number)
        if self._book.number >= number or self._own not in elected:
            return
        turn = elected.index(self._own) + 1  # not at once: the last plan's iterations tell how long things take
        if iteration % PLAN_ITERATIONS >= turn * PLAN_ITERATIONS // (len(elected) + 1):
            await self._make(records, number)

    def _incumbent_took_s(self, records: Mapping[PeerId, PeerRecord]) -> float | None:
        """The median iteration by the newest plan; None if it is not known, or not all origins follow that plan."""
        number = self._book.number
        is_followed = all(record.plan == number for record in records.values() if record.stage == 0)
        is_measured = self._took_by == number > 0 and len(self._took_s) >= LEAST_ITERATIONS
        return median(self._took_s) if is_followed and is_measured else None

    async def _make(self, records: Mapping[PeerId, PeerRecord], number: int) -> None:
        problem = live_case(records, spec=self._spec, payload_bytes=self._payload_bytes)
        if problem is None:
            return
        case, members = problem
        num_microbatches = len(case.partition[0] if case.partition else ()) * self._spec.microbatches
        path_bytes = PLACE_BYTES * case.path_length * num_microbatches
        if path_bytes + PEER_ID_BYTES * len(members) > MAX_PLAN_BYTES - HEADER_BYTES:
            return  # too large to be passed on
        newest = self._book.newest
        incumbent = None if newest is None else newest.restricted(members, case)
        took_s = self._incumbent_took_s(records)
        tasks = 2 * case.path_length * len(members) * self._spec.microbatches
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        try:
            plan, iteration_s = await self._compute.run_aside(
                search,
                case,
                incumbent,
                seed=number,
                max_evaluations=min(MAX_EVALUATIONS, max(64, MAX_TASKS // tasks)),
                took_s=took_s,
            )
        except (UserError, TimeoutError, OSError):
            return  # there is no plan, or none in time: the greedy rule does
        if iteration_s == math.inf or number <= self._book.number:
            return
        document = PlanDocument.of(
            plan, members=members, run=self._run, number=number, planner=self._own, iteration_s=iteration_s
        )
        self._book.take(SignedPlan.sign(document, self._identity), search_s=round(loop.time() - started_s, 2))


def search(
    case: Case, incumbent: Plan | None, *, seed: int, max_evaluations: int, took_s: float | None = None
) -> tuple[Plan, float]:
    """A plan and its simulated iteration; picklable, for a process of its own.

    Args:
        took_s: what iterations by the incumbent took, if that is known.
    """
    if incumbent is not None and took_s is not None:
        case = calibrated(case, transfer_factor([Ran(case, incumbent, took_s)]))
    plan = replan(case, incumbent, dispatch=DISPATCH, seed=seed, seconds=SEARCH_S, max_evaluations=max_evaluations)
    return plan, expected_s(case, plan)
