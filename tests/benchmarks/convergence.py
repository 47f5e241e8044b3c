"""How well does each way of averaging learn, and for how many bytes? Real text, several seeds, equal tokens for everybody.

    python -m tests.benchmarks.convergence [--json] [--replicas 4 8] [--seeds 3] [--steps 2000] [--methods NAME …]
                                           [--jobs 2] [--results FILE] [--fresh] [--stored]

A full sweep takes hours on a small machine, so every finished run is a line of the results file, which is read first: a sweep can
be stopped and taken up again. --stored reports what is there without running anything, --fresh runs everything anew. The
last line is one JSON object: for every N and method the mean and standard deviation over the seeds of the held-out
loss (mean of the replicas), of the averaged model's loss, the replica spread, the bytes one peer sent, and the seeds that
were run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.convergence_cell import MODEL, SEQUENCE_TOKENS, SEQUENCES, Cell, cell_key, run_cell
from tests.benchmarks.stored_runs import run_missing, stored

__all__ = ["ATTEMPTS", "METHODS", "main"]

RESULTS = Path("docs/benchmarks/convergence_runs.jsonl")
STEPS = 2000
PLAIN = {"delta_codec": "bf16", "slow_codec": "bf16"}
"""What the reference methods send: two bytes per value. Their authors send four, which would only favour us."""


def _cell(method: str, lr: float, *, steps: int = STEPS, **more: Any) -> Cell:
    return Cell(method=method, replicas=0, seed=0, steps=steps, lr=lr, **more)


def _theta(*, inner_steps: int) -> dict[str, Any]:
    """noloco in the form that sends θ alone, in four bits."""
    rule = {"algorithm": "noloco", "theta_only": True, "alpha": 0.5, "beta": 0.7, "gamma": 0.7}
    return rule | {"inner_steps": inner_steps, "slow_codec": "lattice"}


def _pair(*, inner_steps: int) -> dict[str, Any]:
    return {"algorithm": "pair-average", "inner_steps": inner_steps, "slow_codec": "lattice"}


def _random(*, share: int, inner_steps: int) -> dict[str, Any]:
    """A random 1/share of the weights, averaged with a partner (sparse continuous averaging)."""
    return _pair(inner_steps=inner_steps) | {"fragments": share, "fragment_choice": "random"}


_MUON = {"optimizer": "muon", "momentum": 0.9}
_MUON_95 = {"optimizer": "muon", "momentum": 0.95}
_DILOCO = {"algorithm": "diloco", "inner_steps": 50, "gamma": 0.0, **PLAIN}

METHODS: dict[str, Cell] = {
    "synchronous": _cell("synchronous", 3e-3, sync={"algorithm": "local"}),
    "local": _cell("local", 1.5e-3, sync={"algorithm": "local"}),
    "pair-average": _cell("pair-average", 1.5e-3, sync={"algorithm": "pair-average", "inner_steps": 50, **PLAIN}),
    "diloco": _cell("diloco", 1.5e-3, sync=_DILOCO),
    "noloco": _cell("noloco", 1.5e-3, sync={"algorithm": "noloco", "theta_only": False, "inner_steps": 50, **PLAIN}),
    "default": _cell("default", 3e-3, sync=_theta(inner_steps=35), inner=_MUON),
}
"""Learning rates and H are each method's best of those tried on seed 0 (docs/LOG.md). `default` is the product's own default, with
at most a quarter of DiLoCo's bytes; its inner optimizer is Muon, which the methods have as well among the attempts."""

ATTEMPTS: dict[str, Cell] = {
    "moonshot": _cell("moonshot", 3e-3, sync=_theta(inner_steps=9), inner=_MUON),
    "synchronous, Muon": _cell("synchronous, Muon", 3e-3, sync={"algorithm": "local"}, inner=_MUON),
    "diloco, Muon": _cell("diloco, Muon", 3e-3, sync=_DILOCO, inner=_MUON),
    "default, Muon 0.95": _cell("default, Muon 0.95", 3e-3, sync=_theta(inner_steps=35), inner=_MUON_95),
    "moonshot, Muon 0.95": _cell("moonshot, Muon 0.95", 3e-3, sync=_theta(inner_steps=9), inner=_MUON_95),
    "synchronous, Muon 0.95": _cell("synchronous, Muon 0.95", 3e-3, sync={"algorithm": "local"}, inner=_MUON_95),
    "diloco, Muon 0.95": _cell("diloco, Muon 0.95", 3e-3, sync=_DILOCO, inner=_MUON_95),
    "diloco, Muon 0.95, lr 1.5e-3": _cell("diloco, Muon 0.95, lr 1.5e-3", 1.5e-3, sync=_DILOCO, inner=_MUON_95),
    "default, Muon 0.95, 8 fragments": _cell(
        "default, Muon 0.95, 8 fragments", 2e-3, sync=_theta(inner_steps=4) | {"fragments": 8}, inner=_MUON_95
    ),
    "default, AdamW": _cell("default, AdamW", 1.5e-3, sync=_theta(inner_steps=35)),
    "default, AdamW, 5 fragments": _cell(
        "default, AdamW, 5 fragments", 1.5e-3, sync=_theta(inner_steps=7) | {"fragments": 5}
    ),
    "default, AdamW, 8 fragments": _cell(
        "default, AdamW, 8 fragments", 2e-3, sync=_theta(inner_steps=4) | {"fragments": 8}
    ),
    "default, AdamW, 8 fragments, α 0.7": _cell(
        "default, AdamW, 8 fragments, α 0.7", 1.5e-3, sync=_theta(inner_steps=4) | {"fragments": 8, "alpha": 0.7}
    ),
    "default, AdamW, lr 2e-3": _cell("default, AdamW, lr 2e-3", 2e-3, sync=_theta(inner_steps=35)),
    "default, AdamW, 10 steps late": _cell(
        "default, AdamW, 10 steps late", 1.5e-3, sync=_theta(inner_steps=35), delay_steps=10
    ),
    "moonshot, AdamW": _cell("moonshot, AdamW", 3e-3, sync=_theta(inner_steps=9)),
    "pair-average lattice, H 6": _cell("pair-average lattice, H 6", 3e-3, sync=_pair(inner_steps=6)),
    "pair-average lattice, H 9": _cell("pair-average lattice, H 9", 3e-3, sync=_pair(inner_steps=9)),
    "pair-average lattice, H 32": _cell("pair-average lattice, H 32", 1.5e-3, sync=_pair(inner_steps=32)),
    "random ninth, every step": _cell("random ninth, every step", 3e-3, sync=_random(share=9, inner_steps=1)),
    "random 45th and its moments": _cell(
        "random 45th and its moments", 3e-3, sync=_random(share=45, inner_steps=1), moments=True
    ),
    "moonshot, AdamW, double batch": _cell(
        "moonshot, AdamW, double batch", 4e-3, sync=_theta(inner_steps=5), sequences=2 * SEQUENCES, steps=STEPS // 2
    ),
    "diloco, 4 bits": _cell("diloco, 4 bits", 1.5e-3, sync=_DILOCO | {"delta_codec": "e3m0"}),
    "diloco, q4, H 54": _cell("diloco, q4, H 54", 1.5e-3, sync=_DILOCO | {"delta_codec": "q4", "inner_steps": 54}),
    "sparseloco, H 12": _cell("sparseloco, H 12", 1.5e-3, sync={"algorithm": "sparseloco", "inner_steps": 12}),
    "diloco, lr 1e-3": _cell("diloco, lr 1e-3", 1e-3, sync=_DILOCO),
    "diloco, lr 2e-3": _cell("diloco, lr 2e-3", 2e-3, sync=_DILOCO),
}
"""Tries beyond the table. `moonshot` spends DiLoCo's bytes on more frequent 4-bit exchanges; the others are why it and the default
are what they are."""


def cells(methods: Iterable[str], *, replicas: Sequence[int], seeds: int, steps: int) -> list[Cell]:
    """The sweep, in the order in which a stopped one is most useful: whole seeds first."""
    known = METHODS | ATTEMPTS
    return [
        replace(known[name], replicas=number, seed=seed, steps=known[name].steps * steps // STEPS)
        for seed in range(seeds)
        for number in replicas
        for name in methods
    ]


def summary(sweep: Sequence[Cell], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per N and method, over the seeds that were run."""
    table: dict[str, dict[str, Any]] = {}
    for number in sorted({cell.replicas for cell in sweep}):
        row: dict[str, Any] = {}
        for method in dict.fromkeys(cell.method for cell in sweep):
            lines = [
                known[cell_key(cell)]
                for cell in sweep
                if (cell.replicas, cell.method) == (number, method) and cell_key(cell) in known
            ]
            if lines:
                row[method] = _statistics(lines)
        if row:
            table[str(number)] = row
    return table


def _statistics(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def mean(field: str) -> float:
        return float(statistics.mean(line[field] for line in lines))

    def deviation(field: str) -> float:
        return statistics.stdev(line[field] for line in lines) if len(lines) > 1 else 0.0

    return {
        "loss_mean": round(mean("loss"), 4),
        "loss_std": round(deviation("loss"), 4),
        "averaged_mean": round(mean("averaged"), 4),
        "averaged_std": round(deviation("averaged"), 4),
        "spread_mean": round(mean("spread"), 5),
        "bytes_per_peer": round(mean("bytes_per_peer")),
        "unreadable_mean": round(mean("unreadable"), 4),
        "seeds": [line["cell"]["seed"] for line in lines],
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--methods", nargs="+", default=[], choices=[*METHODS, *ATTEMPTS], help="default: those of the table"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget the stored runs")
    parser.add_argument("--stored", action="store_true", help="run nothing, report what is stored")
    arguments = parser.parse_args()
    if arguments.fresh:
        arguments.results.unlink(missing_ok=True)
    table_methods = [*METHODS, *ATTEMPTS] if arguments.stored else [*METHODS, "moonshot"]
    sweep = cells(
        arguments.methods or table_methods, replicas=arguments.replicas, seeds=arguments.seeds, steps=arguments.steps
    )
    known = stored(arguments.results)
    if not arguments.stored:
        by_key = {cell_key(cell): cell for cell in sweep}
        run_missing(by_key, arguments.results, run=run_cell, jobs=arguments.jobs, known=known)
    table = summary(sweep, known)
    for number, row in table.items():
        for method, result in row.items():
            print(
                f"N = {number}  {method:14s} {result['loss_mean']:.4f} ± {result['loss_std']:.4f}  averaged "
                f"{result['averaged_mean']:.4f}  spread {result['spread_mean']:.4f}  {result['bytes_per_peer'] / 1e6:9.1f} MB"
            )
    if arguments.json:
        print(
            json.dumps(
                {
                    "convergence": table,
                    "steps": arguments.steps,
                    "tokens_per_replica_step": SEQUENCES * SEQUENCE_TOKENS,
                    "parameters": MODEL.num_parameters,
                }
            )
        )


if __name__ == "__main__":
    main()
