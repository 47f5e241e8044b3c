"""Inner steps of a fixed duration, so that a few cores can carry several peers and still not decide who waits for whom.

A step does its real work and then sleeps, in the thread that trains, until its time is over. Every step is logged with its
begin and end, on the clock that all processes of a machine share; what lies between two steps is what training lost. Of that,
the time in which the thread could have run but other programs had the cores is logged too (Linux counts it for each thread).

    python -m tests.benchmarks.peers.padded STEP_S LOG python -m node join …

runs a node's command line in this process with such steps. The node's code is the real one;
only `Trainer.step` is wrapped, and the compute thread keeps its priority.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from model.batches import RoundBatches
from node.__main__ import main as node_main
from node.trainer import StepStats, Trainer

__all__ = ["PaddedSteps", "Step", "read_steps"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One inner step on the machine's monotonic clock; `computed_s` of it were work. Before it, since the end of the one before,
    the thread stood in the queue for a core for `queued_s`."""

    began_s: float
    ended_s: float
    computed_s: float
    queued_s: float


class PaddedSteps:
    """Makes every step last `step_s`, and logs it.

    Args:
        step_s: duration; a step whose work takes longer lasts as long as its work.
        log: file to append to.
    """

    def __init__(self, step_s: float, log: Path) -> None:
        self._step_s, self._log = step_s, log.open("a", buffering=1)
        self._queued_s = queued_s()

    def run(self, work: Callable[[], T]) -> T:
        """One step."""
        began_s, before_s = time.monotonic(), queued_s() - self._queued_s
        result = work()
        computed_s = time.monotonic() - began_s
        time.sleep(max(0.0, self._step_s - computed_s))
        self._log.write(f"{began_s:.4f} {time.monotonic():.4f} {computed_s:.4f} {before_s:.4f}\n")
        self._queued_s = queued_s()
        return result


def read_steps(log: Path) -> list[Step]:
    """What a peer has logged so far."""
    whole = [line.split() for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [Step(began_s=float(b), ended_s=float(e), computed_s=float(c), queued_s=float(q)) for b, e, c, q in whole]


def queued_s() -> float:
    """How long this thread has been ready to run without a core."""
    _on_core_ns, queued_ns, _num_turns = Path("/proc/thread-self/schedstat").read_text().split()
    return int(queued_ns) * 1e-9


def main() -> None:
    """Wrap the trainer, and run the node."""
    steps = PaddedSteps(float(sys.argv[1]), Path(sys.argv[2]))

    class PaddedTrainer(Trainer):
        def step(self, batches: RoundBatches, num_sequences: int) -> StepStats:
            return steps.run(lambda: super(PaddedTrainer, self).step(batches, num_sequences))

    sys.argv = ["llm-node", *sys.argv[sys.argv.index("node") + 1 :]]
    # At the priority of everything else here: other work on a shared machine should hit all variants alike.
    with patch("node.peer.Trainer", PaddedTrainer), patch("node.compute.NICENESS", os.nice(0)):
        node_main()


if __name__ == "__main__":
    main()
