"""What a plan takes on the average day: its iteration simulated on a few cases that differ as one day differs from the next.

Transfers and passes never take exactly what they usually take. A plan that was searched for with exact times is one in which
much happens to fit exactly; a few milliseconds more undo that, and it takes longer than promised. So where a case has a
`spread`, what is promised of a plan, and which of several is taken, goes by the mean over variants of the case, which the search
(node/pipeline/improve.py) never sees. To search by that mean was tried: at a fraction of the plans per second, and with four
variants to fit exactly instead of one, what it found was no better on other days.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache

import numpy as np

from node.pipeline.case import Case
from node.pipeline.plan import Plan
from node.pipeline.replay import replay
from node.pipeline.replay_native import Replayer

__all__ = ["NUM_VARIANTS", "expected_s", "variants"]

NUM_VARIANTS = 8
_KEPT = 2
"""Cases whose variants are remembered: one is judged several times, and a large one takes tens of megabytes."""


def variants(case: Case) -> tuple[Case, ...]:
    """The case itself if it has no spread; else cases whose links and speeds are drawn, always the same ones."""
    return (case,) if case.spread == 0.0 else _drawn(case)


def expected_s(case: Case, plan: Plan) -> float:
    """Mean seconds of the iteration; infinite if it does not always end."""
    drawn = variants(case)
    lengths = {len(each.path) for each in plan.microbatches}
    if lengths != {case.path_length}:  # the compiled simulation knows no others
        return sum(replay(each, plan)[0] for each in drawn) / len(drawn)
    paths = np.array([each.path for each in plan.microbatches], dtype=np.int32)
    priorities = np.array([each.priority for each in plan.microbatches], dtype=np.float64)
    ends = np.empty(len(paths))
    runs = [Replayer(each).run(paths, priorities, dispatch=plan.dispatch, ends=ends) for each in drawn]
    return sum(runs) / len(runs) + case.closing_s


@lru_cache(_KEPT)
def _drawn(case: Case) -> tuple[Case, ...]:
    """In pairs: what is slow in one is fast in the other."""
    found = []
    for pair in range(NUM_VARIANTS // 2):
        rng = random.Random(pair)
        links = [[rng.gauss(0.0, case.spread) for _ in row] for row in case.link_s]
        speeds = [rng.gauss(0.0, case.spread / 2) for _ in case.forward_s]
        for sign in (1.0, -1.0):
            link_s = tuple(
                tuple(each * math.exp(sign * factor) for each, factor in zip(row, factors, strict=True))
                for row, factors in zip(case.link_s, links, strict=True)
            )
            forward_s = tuple(
                each * math.exp(sign * factor) for each, factor in zip(case.forward_s, speeds, strict=True)
            )
            found.append(case.model_copy(update={"link_s": link_s, "forward_s": forward_s}))
    return tuple(found)
