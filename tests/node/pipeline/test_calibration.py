"""What iterations took tells how slow transfers are, and the next plan is made for that."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from node.compute import VirtualCompute
from node.pipeline.calibration import MOST, Ran, calibrated, transfer_factor
from node.pipeline.case import Case
from node.pipeline.construct import construct
from node.pipeline.plan import Microbatch, Plan
from node.pipeline.planning import Planning, search
from node.pipeline.published import PLAN_ITERATIONS, planners
from node.pipeline.variants import expected_s
from protocol.identity import Identity
from protocol.virtual_time import run_virtual
from tests.node.pipeline.cases import drawn_case, drawn_document
from tests.node.pipeline.records import peer_id, record
from tests.node.runs import tiny_run


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.15, 1.3, 1.45])
@pytest.mark.parametrize("seed", range(4))
def test_iterations_tell_how_slow_transfers_are(seed: int, factor: float) -> None:
    case = drawn_case(seed, spread=0.25, uplink_s=[0.4], downlink_s=[0.3])
    plans = [construct(case, seed=number) for number in range(3)]
    ran = [Ran(case, plan, expected_s(calibrated(case, factor), plan)) for plan in plans]
    found = transfer_factor(ran)
    predicted = sum(expected_s(calibrated(case, found), plan) for plan in plans)
    assert predicted == pytest.approx(sum(each.seconds for each in ran), rel=0.02)


def test_nothing_has_run_and_nothing_is_believed_without_end() -> None:
    case = drawn_case(1)
    plan = construct(case)
    assert transfer_factor([]) == 1.0
    assert transfer_factor([Ran(case, plan, 1e6)]) == MOST


def test_the_next_plan_is_made_for_links_as_slow_as_the_last_one_found_them() -> None:
    case = drawn_case(4, spread=0.25)
    plan, promised_s = search(case, None, seed=1, max_evaluations=64)
    _, hoped_s = search(case, plan, seed=1, max_evaluations=64)
    again, learnt_s = search(case, plan, seed=1, max_evaluations=64, took_s=1.25 * promised_s)
    assert learnt_s > 1.1 * hoped_s
    factor = transfer_factor([Ran(case, plan, 1.25 * promised_s)])
    assert learnt_s == expected_s(calibrated(case, factor), again)


def test_a_plan_that_never_ends_by_our_links_tells_nothing() -> None:
    """In practice it did end: whoever waits for a slot too long is gone around."""
    drawn = drawn_document(0)
    document = drawn | {
        "num_nodes": 4,
        "stage_sizes": [2, 1, 1],
        "path_length": 3,
        "slots_per_node": 1,
        "rounds": 1,
        "forward_s": [1.0] * 4,
        "link_s": [[0.0] * 4] * 4,
        "spread": 0.25,
    }
    crossed = tuple(Microbatch(path=path) for path in ((0, 2, 3), (1, 3, 2)))
    plan = Plan(partition=((0, 1), (2,), (3,)), microbatches=crossed)
    case = Case.model_validate(document)
    assert expected_s(case, plan) == math.inf
    assert transfer_factor([Ran(case, plan, 10.0)]) == 1.0


@pytest.mark.parametrize("share", [0.8, 1.25])
def test_where_transfers_take_no_time_they_are_not_to_blame(share: float) -> None:
    case = drawn_case(2, link_s=[[0.0] * 6] * 6)
    plan = construct(case)
    assert transfer_factor([Ran(case, plan, share * expected_s(case, plan))]) == 1.0


class WatchingCompute(VirtualCompute):
    """Tells what a search was given, and makes no plan."""

    def __init__(self) -> None:
        super().__init__(seconds_per_call=0.0)
        self.told: list[float | None] = []

    async def run_aside(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.told.append(kwargs["took_s"])
        raise TimeoutError


@pytest.mark.parametrize(("followed", "learnt"), [((1, 1), 5.0), ((1, 0), None)])
def test_only_iterations_by_a_plan_that_all_origins_followed_teach(
    tmp_path: Path, followed: tuple[int, int], learnt: float | None
) -> None:
    """An origin that finds a plan slow goes the greedy way: what its iterations take says nothing of the plan."""
    signed, _ = tiny_run(tmp_path, model__num_layers=4, pipeline__stages=4)
    plans = [*followed, 1, 1, 1]
    found = {
        peer_id(number): record(number, max(0, number - 1), run=signed.manifest.run_id, forward_s=0.1, plan=plan)
        for number, plan in enumerate(plans)
    }
    (own, *_), compute = planners(found, run=signed.manifest.run_id, number=2), WatchingCompute()
    identity = next(each for each in map(_identity, range(len(plans))) if each.peer_id == own)
    book: Any = SimpleNamespace(number=1, newest=None, fetch=AsyncMock())
    planning = Planning(signed.manifest, book=book, payload_bytes=1000, identity=identity, compute=compute)
    for seconds in (4.0, 5.0, 60.0):
        planning.note_iteration(1, seconds)
    run_virtual(planning.look(found, 2 * PLAN_ITERATIONS - 1))
    assert compute.told == [learnt]


def _identity(number: int) -> Identity:
    return Identity.generate(bytes([number]) * 32)
