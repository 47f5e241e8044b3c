"""A process that forks children which save checkpoints for ever, and kills each at a random moment with SIGKILL.

Run as `python -m tests.model.crashing_saver FOLDER NUM_KILLS SEED`. After every kill it loads what is left and prints
`last finished save, loaded generation`; a checkpoint that can not be read ends it with an error. One process does it all because
importing torch takes longer than the kill.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
from pathlib import Path

import torch

from model.checkpoint import load_newest, save_checkpoint

_SHAPES = {"small": (100,), "large": (400_000,)}


def save_for_ever(folder: Path, start: int, report: int) -> None:
    """Save generation after generation, telling each finished number as eight bytes."""
    for generation in range(start, 10**8):
        tensors = {name: torch.full(shape, float(generation)) for name, shape in _SHAPES.items()}
        save_checkpoint(folder, tensors, {"generation": generation}, generation=generation)
        os.write(report, generation.to_bytes(8, "little"))


def kill_once(folder: Path, start: int, chance: random.Random) -> tuple[int, int]:
    """Let a child save two generations and more, kill it, and load; returns the last finished and the loaded generation."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        save_for_ever(folder, start, writer)
        os._exit(1)
    os.close(writer)
    last = max(int.from_bytes(os.read(reader, 8), "little") for _ in range(2))
    select.select([], [], [], chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while told := os.read(reader, 8):
        last = int.from_bytes(told, "little")
    os.close(reader)
    checkpoint = load_newest(folder)
    assert checkpoint is not None
    assert checkpoint.meta == {"generation": checkpoint.generation}
    for name, shape in _SHAPES.items():
        assert torch.equal(checkpoint.tensors[name], torch.full(shape, float(checkpoint.generation)))
    return last, checkpoint.generation


def main() -> None:
    folder, num_kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    start = 0
    for _ in range(num_kills):
        last, generation = kill_once(folder, start, chance)
        sys.stdout.write(f"{last} {generation}\n")
        start = generation + 1


if __name__ == "__main__":
    main()
