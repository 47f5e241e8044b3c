"""Training runs of a sweep that takes hours: each finished one is a line of a results file, which is read first.

So a sweep can be stopped and taken up again, and tables can be made without running anything. A run is found by its key, which
names everything that decides its result but the code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Line", "run_missing", "stored"]

Line = dict[str, Any]
C = TypeVar("C")


def stored(path: Path) -> dict[str, Line]:
    """Finished runs by key."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["key"]: line for line in lines}


def run_missing(
    cells: Mapping[str, C], path: Path, *, run: Callable[[C], Line], jobs: int, known: dict[str, Line]
) -> None:
    """Run what is not known yet, `jobs` at a time, and append each result as it comes.

    Args:
        cells: by key, in the order in which they are begun; dataclasses with a `method` and a `seed`.
        path: the results file; made if missing.
        run: runs one, in a process of its own; what it returns has a `loss` and `seconds`.
        known: finished runs by key; the new ones are added.
    """
    missing = {key: cell for key, cell in cells.items() if key not in known}
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {pool.submit(run, cell): key for key, cell in missing.items()}
        for done in as_completed(running):
            key = running[done]
            fields = asdict(missing[key])  # type: ignore[call-overload]
            known[key] = line = {"key": key, "cell": fields, **done.result()}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            size = f"N = {fields['replicas']}, " if "replicas" in fields else ""
            print(
                f"{fields['method']}, {size}seed {fields['seed']}: {line['loss']:.4f}, {line['seconds']:.0f} s",
                flush=True,
            )
