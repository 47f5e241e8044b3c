"""What does it cost in loss to skip stages? A model in 12 stages on real text, several seeds, the same batches for every method.

    python -m tests.benchmarks.partial [--json] [--seeds 3] [--steps 650] [--methods NAME …] [--jobs 2] [--results FILE]
                                       [--fresh] [--stored]

A microbatch visits 12 of the 12 stages (`full`), 9 or 8. With swaps neighbouring stages change places now and then, as when live.
Every finished run is a line of the results file, which is read first: a sweep can be stopped and taken up again. --stored reports
what is there without running anything, --fresh runs everything anew. The last line is one JSON object: for every method
`loss` of the whole model on held-out text, mean and standard deviation over the seeds, `perplexity_ratio` to `full`, the
`compute_saved` in training, and `omitted`: the loss when `count` stages are left out afterwards, mean over as many sets of
stages as there are stages but the first, which is always kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.partial_cell import Cell, cell_key, run_cell
from tests.benchmarks.stored_runs import Line, run_missing, stored

__all__ = ["ATTEMPTS", "METHODS", "cells", "main", "summary"]

RESULTS = Path("docs/benchmarks/partial_runs.jsonl")
STEPS = 650
FULL_LR = 2e-3
PARTIAL_LR = 2e-3


def _cell(method: str, lr: float, **more: Any) -> Cell:
    return Cell(method=method, seed=0, steps=STEPS, lr=lr, **more)


METHODS: dict[str, Cell] = {
    cell.method: cell
    for cell in (
        _cell("full", FULL_LR, swaps=False),
        _cell("skip 25 %", PARTIAL_LR, skip_ratio=0.25),
        _cell("skip 25 %, no swaps", PARTIAL_LR, skip_ratio=0.25, swaps=False),
        _cell("skip 33 %", PARTIAL_LR, skip_ratio=0.33),
        _cell("skip 33 %, no swaps", PARTIAL_LR, skip_ratio=0.33, swaps=False),
    )
}
"""2e-3 is the best of 1e-3, 2e-3 and 4e-3 for `full` and for 25 % alike, on a seed that is not in the table (docs/LOG.md)."""

ATTEMPTS: dict[str, Cell] = {
    cell.method: cell
    for cell in (
        _cell("full, swaps", FULL_LR),
        replace(_cell("skip 25 %, 4/3 of the tokens", PARTIAL_LR, skip_ratio=0.25), steps=STEPS * 4 // 3),
    )
}
"""Beyond the table: what swaps alone cost, and skipping with about as much compute as the full pipeline has."""


def cells(methods: Iterable[str], *, seeds: int, steps: int) -> list[Cell]:
    """The sweep, in the order in which a stopped one is most useful: whole seeds first."""
    known = METHODS | ATTEMPTS
    return [
        replace(known[name], seed=seed, steps=known[name].steps * steps // STEPS)
        for seed in range(seeds)
        for name in methods
    ]


def summary(sweep: Sequence[Cell], known: dict[str, Line]) -> dict[str, dict[str, Any]]:
    """Per method, over the seeds that were run."""
    lines: dict[str, dict[int, Line]] = {}
    for cell in sweep:
        if line := known.get(cell_key(cell)):
            lines.setdefault(cell.method, {})[cell.seed] = line
    full = lines.get("full", {})
    return {method: _statistics(by_seed, full) for method, by_seed in lines.items()}


def _statistics(by_seed: dict[int, Line], full: dict[int, Line]) -> dict[str, Any]:
    lines = list(by_seed.values())

    def mean(field: Callable[[Line], float]) -> float:
        return statistics.fmean(map(field, lines))

    def deviation(field: Callable[[Line], float]) -> float:
        return statistics.stdev(map(field, lines)) if len(lines) > 1 else 0.0

    def omitting(place: int) -> dict[str, Any]:
        loss = mean(lambda line: line["omitted"][place]["loss"])
        return {
            "count": lines[0]["omitted"][place]["count"],
            "loss": round(loss, 4),
            "loss_std": round(deviation(lambda line: line["omitted"][place]["loss"]), 4),
            "perplexity_ratio": round(math.exp(loss - mean(lambda line: line["loss"])), 4),
        }

    above_full = [line["loss"] - full[seed]["loss"] for seed, line in by_seed.items() if seed in full]
    return {
        "loss": round(mean(lambda line: line["loss"]), 4),
        "loss_std": round(deviation(lambda line: line["loss"]), 4),
        "perplexity_ratio": round(math.exp(statistics.fmean(above_full)), 4) if above_full else None,
        "compute_saved": round(mean(lambda line: line["compute_saved"]), 4),
        "path_length": lines[0]["path_length"],
        "stages": lines[0]["stages"],
        "parameters": lines[0]["parameters"],
        "tokens": lines[0]["tokens"],
        "swapped": round(mean(lambda line: line["swapped"]), 3),
        "lr": lines[0]["cell"]["lr"],
        "seconds": round(mean(lambda line: line["seconds"])),
        "seeds": sorted(by_seed),
        "omitted": [omitting(place) for place in range(len(lines[0]["omitted"]))],
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ATTEMPTS], help="default: those of the table")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget the stored runs")
    parser.add_argument("--stored", action="store_true", help="run nothing, report what is stored")
    arguments = parser.parse_args()
    if arguments.fresh:
        arguments.results.unlink(missing_ok=True)
    table_methods = [*METHODS, *ATTEMPTS] if arguments.stored else list(METHODS)
    sweep = cells(arguments.methods or table_methods, seeds=arguments.seeds, steps=arguments.steps)
    known = stored(arguments.results)
    if not arguments.stored:
        by_key = {cell_key(cell): cell for cell in sweep}
        run_missing(by_key, arguments.results, run=run_cell, jobs=arguments.jobs, known=known)
    table = summary(sweep, known)
    for method, result in table.items():
        omitted = "  ".join(f"{each['count']}: {each['loss']:.3f}" for each in result["omitted"])
        print(f"{method:20s} {result['loss']:.4f} ± {result['loss_std']:.4f}  stages omitted {omitted}")
    if arguments.json:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
