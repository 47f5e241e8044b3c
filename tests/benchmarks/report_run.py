"""Running one benchmark: its last line, with the date, commit, command and machine, becomes a JSON file.

The benchmark is a process of its own, so that no benchmark measures in the memory, threads or caches of the one before.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

__all__ = ["BenchmarkError", "describe_machine", "load_result", "run_benchmark"]

FIELDS = ("date", "commit", "command", "wall_s", "load_before", "machine", "result")


class BenchmarkError(RuntimeError):
    """A benchmark or its report cannot go on; one line with cause and remedy."""


def run_benchmark(name: str, folder: Path, *, options: str = "") -> None:
    """Run `tests.benchmarks.NAME --json`, with its output on the terminal, and store `folder`/NAME.json.

    Raises:
        BenchmarkError: It failed, or its last line was no JSON object. An older file then stays as it was.
    """
    command = ["-m", f"tests.benchmarks.{name}", "--json", *shlex.split(options)]
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": describe_commit(),
        "command": shlex.join(["python", *command]),
        "load_before": round(os.getloadavg()[0], 1),
        "machine": describe_machine(),
    }
    print(f"== {document['command']}", flush=True)
    started_s = time.monotonic()
    last = ""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        raise BenchmarkError(f"{name} failed with exit status {process.returncode}: its messages are above")
    try:
        result = json.loads(last)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise BenchmarkError(f"{name} did not end with one JSON object in a line: see tests/benchmarks/{name}.py")
    document |= {"wall_s": round(time.monotonic() - started_s, 1), "result": result}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load_result(path: Path) -> dict[str, Any]:
    """A stored result with its `result`, `machine`, `date`, `commit`, `command`, `wall_s` and `load_before`.

    Raises:
        BenchmarkError: The file is no such result.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        document = None
    if not isinstance(document, dict) or any(field not in document for field in FIELDS):
        raise BenchmarkError(f"{path.name} is no stored result: delete it, or run make bench NAMES={path.stem}")
    return document


def describe_commit() -> str:
    """Short hash of the commit; says so when the code differs from it. Changes under docs/ do not count."""
    try:
        commit = subprocess.check_output(
            ["git", "rev-parse", "--short=10", "HEAD"], stderr=subprocess.DEVNULL, text=True
        )
        changes = subprocess.check_output(["git", "status", "--porcelain", "--", ".", ":!docs"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + (" with local changes" if changes else "")


def describe_machine() -> dict[str, str | int | float]:
    """What decides speed here: processor, the cores we may use, memory in GiB, and the versions of what runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_GiB": round(psutil.virtual_memory().total / 2**30),
        "os": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }


def _cpu_model() -> str:
    """The model name; Linux alone has it in a file, and virtual machines often hide the exact one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
