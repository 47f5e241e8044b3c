"""How good are the planner's partial pipelines? Published and drawn cases, beside a well-matched full pipeline and a lower bound.

    python -m tests.benchmarks.schedule [--json] [--seconds 30] [--seeds 1] [--names NAME …]

Per case `iteration_s` of the plan, `bound_s` for its partition, `full_pipeline_s` of the same planner when no stage may be
skipped, `solver_s`, `violations` (by an independent referee, which must replay the same time), and, where they are known,
`reference_s` of SkipPipe's planner (`reference_solver_s` is what it took) and `prototype_s`; `fixed_iteration_s` and
`fixed_bound_s` are for the published partition. With several seeds the times are medians, and `iteration_range_s` is the range.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from node.pipeline.case import Case
from node.pipeline.solver import Solution, solve
from tests.benchmarks.schedule_cases import Problem, drawn_problems, published_problems
from tests.node.pipeline import referee

__all__ = ["main", "measure"]


def measure(problem: Problem, *, seconds: float, seeds: int) -> dict[str, Any]:
    """Everything about one case."""
    case = Case.model_validate(problem.case)
    free = [solve(case, seconds=seconds, seed=1000 * seed) for seed in range(seeds)]
    full = solve(case.full_pipeline(), seconds=seconds)
    result: dict[str, Any] = {
        "iteration_s": _median([solution.iteration_s for solution in free]),
        "iteration_range_s": [round(pick(solution.iteration_s for solution in free), 2) for pick in (min, max)],
        "bound_s": _median([solution.bound_s for solution in free]),
        "gap": round(statistics.median(solution.gap for solution in free), 3),
        "full_pipeline_s": round(full.iteration_s, 2),
        "full_pipeline_bound_s": round(full.bound_s, 2),
        "solver_s": _median([solution.solver_s for solution in free]),
        "violations": [each for solution in free for each in _violations(problem.case, solution)],
    }
    result["less_than_full"] = round(1.0 - result["iteration_s"] / result["full_pipeline_s"], 3)
    if problem.partition is not None:
        given = case.model_copy(update={"partition": tuple(tuple(stage) for stage in problem.partition)})
        fixed = [solve(given, seconds=seconds, seed=1000 * seed) for seed in range(seeds)]
        result |= {
            "reference_s": problem.reference_s,
            "prototype_s": problem.prototype_s,
            "fixed_iteration_s": _median([solution.iteration_s for solution in fixed]),
            "fixed_bound_s": _median([solution.bound_s for solution in fixed]),
        }
        result["violations"] += [each for solution in fixed for each in _violations(problem.case, solution)]
    return result


def _violations(case: dict[str, Any], solution: Solution) -> list[str]:
    """What the referee finds wrong, its own time of the iteration included."""
    plan = solution.plan.to_json()
    found = referee.violations(case, plan)
    replayed_s = None if found else referee.replay(case, plan)
    if not found and (replayed_s is None or abs(replayed_s - solution.iteration_s) > 1e-6):
        found = [f"the referee's iteration takes {replayed_s} s, not {solution.iteration_s} s"]
    return found


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 2)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--seconds", type=float, default=30.0, help="of planning, per plan")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--names", nargs="+", default=[], help="only these cases")
    arguments = parser.parse_args()
    results = {}
    for problem in (*published_problems(), *drawn_problems()):
        name = problem.case["name"]
        if not arguments.names or name in arguments.names:
            results[name] = measure(problem, seconds=arguments.seconds, seeds=arguments.seeds)
            print(name, json.dumps(results[name]), flush=True)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
