"""Many plans of one case, one after the other: compiled where this machine has a C compiler, in Python elsewhere.

The planner's search is as good as the number of plans it can try. node/pipeline/replay.c tries some twenty times as many per
second as node/pipeline/replay.py, whose results it repeats exactly.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.native import compiled_library
from node.pipeline.case import Case
from node.pipeline.plan import Dispatch
from node.pipeline.replay import route, run

__all__ = ["Replayer", "has_compiler"]

SOURCE = Path(__file__).with_name("replay.c")
_DISPATCH: dict[Dispatch, int] = {"fifo": 0, "priority": 1, "backward_first": 2}
_ROUTES_KEPT = 1 << 14

Paths = NDArray[np.int32]
Numbers = NDArray[np.float64]


class _Case(ctypes.Structure):
    """`Case` in replay_events.h."""

    _fields_ = (
        ("num_nodes", ctypes.c_int32),
        ("path_length", ctypes.c_int32),
        ("backward_multiplier", ctypes.c_double),
        ("loss_multiplier", ctypes.c_double),
        ("gap_s", ctypes.c_double),
        ("gap_first_s", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("forward_s", "link_s", "slots", "uplink_s", "downlink_s")),
    )


class Replayer:
    """Simulates iterations of one case.

    Args:
        case: the problem.
        is_native: False keeps to Python, where there is a compiler, too.
    """

    def __init__(self, case: Case, *, is_native: bool = True) -> None:
        self._case = case
        self._function = _compiled() if is_native else None
        self._route = functools.lru_cache(_ROUTES_KEPT)(functools.partial(route, case))
        per_node = [case.forward_s, case.link_s, case.uplink_s, case.downlink_s]
        self._arrays = [np.ascontiguousarray(values, dtype=np.float64) for values in per_node]
        self._slots = np.array(case.slots_per_node, dtype=np.int32)
        forward_s, link_s, uplink_s, downlink_s = (array.ctypes.data for array in self._arrays)
        self._native_case = _Case(
            case.num_nodes,
            case.path_length,
            case.backward_multiplier,
            case.loss_multiplier,
            case.gap_s,
            case.gap_first_s,
            forward_s,
            link_s,
            self._slots.ctypes.data,
            uplink_s if case.shares_lines else None,
            downlink_s if case.shares_lines else None,
        )

    def run(
        self,
        paths: Paths,
        priorities: Numbers,
        *,
        dispatch: Dispatch = "fifo",
        cutoff_s: float = math.inf,
        ends: Numbers,
    ) -> float:
        """As `node.pipeline.replay.run`.

        Args:
            paths: C-contiguous [microbatches, path length].
            priorities: [microbatches].
            dispatch: how nodes choose.
            cutoff_s: when to give up.
            ends: [microbatches], takes the end of every microbatch, if the result is finite.
        """
        if self._function is None:
            routes = [self._route(tuple(path)) for path in paths.tolist()]
            found = [0.0] * len(routes)
            seconds = run(self._case, routes, priorities.tolist(), dispatch=dispatch, cutoff_s=cutoff_s, ends=found)
            ends[:] = found
            return seconds
        result = self._function(
            ctypes.byref(self._native_case),
            len(paths),
            paths.ctypes.data,
            priorities.ctypes.data,
            _DISPATCH[dispatch],
            cutoff_s,
            ends.ctypes.data,
        )
        if math.isnan(result):
            raise MemoryError
        return float(result)


def has_compiler() -> bool:
    """Whether plans are tried by compiled code here."""
    return _compiled() is not None


def _compiled() -> ctypes._FuncPointer | None:
    library = compiled_library(SOURCE)
    if library is None:
        return None
    function = library.llm_node_replay
    function.restype = ctypes.c_double
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    function.argtypes = (pointer, integer, pointer, pointer, integer, ctypes.c_double, pointer)
    return function
