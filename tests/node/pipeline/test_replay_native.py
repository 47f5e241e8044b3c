"""The compiled simulation is the Python one, digit for digit."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest

from kernels import native
from node.pipeline.case import Case
from node.pipeline.construct import construct
from node.pipeline.plan import Dispatch
from node.pipeline.replay_native import Replayer, has_compiler
from tests.node.pipeline.cases import drawn_case


def lines(case: Case) -> Case:
    """The same nodes, whose transfers share their lines."""
    nodes = range(case.num_nodes)
    return case.model_copy(update={"uplink_s": tuple(0.3 + 0.01 * n for n in nodes), "downlink_s": (0.2,) * len(nodes)})


@pytest.mark.skipif(not has_compiler(), reason="no C compiler here: plans are tried in Python")
@pytest.mark.parametrize("dispatch", get_args(Dispatch))
@pytest.mark.parametrize("shares_lines", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_both_ways_agree(seed: int, shares_lines: bool, dispatch: Dispatch) -> None:
    case = lines(drawn_case(seed)) if shares_lines else drawn_case(seed)
    paths = np.array([each.path for each in construct(case, seed=seed).microbatches], dtype=np.int32)
    priorities = np.arange(len(paths), dtype=np.float64) % 4
    ends, expected_ends = np.zeros(len(paths)), np.zeros(len(paths))
    native, plain = Replayer(case), Replayer(case, is_native=False)
    expected = plain.run(paths, priorities, dispatch=dispatch, ends=expected_ends)
    assert native.run(paths, priorities, dispatch=dispatch, ends=ends) == expected
    if expected < math.inf:
        assert ends.tolist() == expected_ends.tolist()
        for replayer in (native, plain):
            shorter = replayer.run(paths, priorities, dispatch=dispatch, cutoff_s=0.99 * expected, ends=ends)
            assert shorter == math.inf


def test_without_a_compiler_plans_are_tried_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    native.compiled_library.cache_clear()
    try:
        assert not has_compiler()
        case = drawn_case(1)
        paths = np.array([each.path for each in construct(case).microbatches], dtype=np.int32)
        assert 0.0 < Replayer(case).run(paths, np.zeros(len(paths)), ends=np.zeros(len(paths))) < math.inf
    finally:
        native.compiled_library.cache_clear()
