"""A few seconds of measuring before the first step: how many threads are fastest, and how many sequences per step make a round
last its target time."""

from __future__ import annotations

import time

import numpy as np
import torch

from model.batches import RoundBatches
from node.trainer import Trainer
from node.training_state import model_config
from protocol.manifest import Manifest

__all__ = ["choose_sequences", "choose_threads", "most_sequences", "seconds_per_step"]

BUDGET_S = 2.0


def seconds_per_step(trainer: Trainer, num_sequences: int) -> float:
    """Time one forward and backward pass on random tokens. The weights stay as they are."""
    vocabulary, tokens = trainer.manifest.model.vocab_size, trainer.manifest.inner.sequence_tokens
    noise = np.random.default_rng(0).integers(0, vocabulary, size=4 * (tokens + 1), dtype=np.uint32)
    batch = RoundBatches(noise, seed=0, sequence_tokens=tokens).next(num_sequences).to(trainer.flat.theta.device)
    started = time.perf_counter()
    trainer.model.loss(batch).backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - started
    trainer.optimizer.zero_grad(set_to_none=False)
    return seconds


def choose_threads(trainer: Trainer) -> int:
    """Let torch use one thread or all it has, whichever is faster for this model. Small matrices lose more by waiting for
    each other than they gain (measured: the 1M preset is 20 times slower on two busy cores with two threads than with one)."""
    most = torch.get_num_threads()
    if most == 1:
        return 1
    seconds = {}
    for threads in (most, 1):
        torch.set_num_threads(threads)
        seconds_per_step(trainer, trainer.manifest.inner.min_sequences)
        seconds[threads] = seconds_per_step(trainer, trainer.manifest.inner.min_sequences)
    fastest = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(fastest)
    return fastest


def most_sequences(manifest: Manifest, *, free_bytes: int) -> int:
    """Sequences per step whose activations fit into half of the free memory; at least the run's minimum, at most its maximum."""
    inner, shape = manifest.inner, model_config(manifest)
    fitting = free_bytes // 2 // shape.activation_bytes(inner.sequence_tokens)
    return min(max(fitting, inner.min_sequences), inner.max_sequences)


def choose_sequences(trainer: Trainer, *, most: int | None = None, budget_s: float = BUDGET_S) -> int:
    """Sequences per step for the run's target round time on this machine, measured within about `budget_s` seconds.

    The batch is doubled until it would take longer than half a step should, or the budget is spent. The first pass of each
    size pays for memory that later passes reuse, so it counts only when it alone spends the budget.
    """
    inner, sync = trainer.manifest.inner, trainer.manifest.sync
    most = inner.max_sequences if most is None else most
    target_s = sync.round_target_s / sync.inner_steps
    sequences, deadline = inner.min_sequences, time.perf_counter() + budget_s
    while True:
        seconds = seconds_per_step(trainer, sequences)
        if time.perf_counter() + 2 * seconds < deadline:
            seconds = min(seconds_per_step(trainer, sequences) for _ in range(2))
        enough = seconds >= target_s / 2 or sequences * 2 > most
        if enough or time.perf_counter() + 6 * seconds > deadline:
            break
        sequences *= 2
    wanted = round(sequences * target_s / seconds)
    return min(max(wanted, inner.min_sequences), most)
