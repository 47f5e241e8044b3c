"""One training run of the partial-pipeline benchmark: a model in stages on real text, and how many of them a microbatch visits.

Everything that decides the result is the product's own code: stages, initial weights, batches, the random orders of stages
(node/pipeline/routing.py), activations and gradients in the manifest's codec, gradients divided by the tokens that visited a
stage, and the stage's own inner step. Only the network is left out: one replica per stage, all in one process, and the
microbatches of an iteration go through one after another. That changes no number, since weights stay as they are until an
iteration's end. Runs with the same seed see the same microbatches in the same order, whatever they skip.

Without swaps a microbatch visits the stages that it would visit with them, in ascending order: the same lots, the same stages.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.batches import RoundBatches, heldout_batches
from model.data import Tokens
from model.stage import Stage, run_path
from node.pipeline.activations import ActivationCodec
from node.pipeline.routing import Replica, StageMap
from node.pipeline.trainer import StageTrainer
from protocol.identity import Identity
from protocol.ids import PeerId
from protocol.manifest import Manifest
from tests.benchmarks.convergence_cell import VOCABULARY, texts

__all__ = ["Cell", "Pipeline", "cell_key", "manifest_of", "omitted_subsets", "paths", "run_cell", "train"]

SEQUENCE_TOKENS = 64
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 144,
    "intermediate_size": 384,
    "num_layers": 12,
    "num_heads": 3,
    "num_kv_heads": 3,
    "max_sequence_tokens": SEQUENCE_TOKENS,
}
PIPELINE = {"stages": 12, "microbatch_sequences": 2}
"""A layer per stage, and 9 or 8 of 12 stages are exactly 25 or 33 % fewer. Half as many sequences per microbatch as by default:
with so few tokens in all, more steps are worth more than larger ones."""
HELDOUT_TOKENS = 16_385
EVALUATION_SEQUENCES = 16
WARMUP_STEPS = 50
DECAY_SHARE = 0.2
DECIDING = ("stages", "skip_ratio", "codec", "microbatch_sequences", "microbatches")
"""Fields of [pipeline] that matter here; the others are about time and memory."""
ZERO = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Args:
        method: its name in the table.
        seed: of the initial weights, the batches and the orders of stages.
        steps: iterations, each one inner step of every stage.
        lr: peak learning rate.
        skip_ratio: share of the stages that a microbatch skips.
        swaps: whether neighbouring stages are exchanged now and then, as in live runs.
        pipeline: other fields of the manifest's [pipeline] section, as an organiser would write them.
        model: of [model].
        inner: of [inner].
    """

    method: str
    seed: int
    steps: int
    lr: float
    skip_ratio: float = 0.0
    swaps: bool = True
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    inner: Mapping[str, Any] = field(default_factory=dict)


def cell_key(cell: Cell) -> str:
    """Names a cell by everything that decides its result but the code."""
    manifest = manifest_of(cell).model_dump(mode="json")  # with all defaults as they are now
    pipeline = {name: manifest["pipeline"][name] for name in DECIDING}
    fields = asdict(cell) | {"model": manifest["model"], "inner": manifest["inner"], "pipeline": pipeline}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def manifest_of(cell: Cell) -> Manifest:
    """The run as a manifest; what stands for its files is never read."""
    inner = {"lr": cell.lr, "warmup_steps": WARMUP_STEPS, "sequence_tokens": SEQUENCE_TOKENS}
    return Manifest.model_validate(
        {
            "name": "partial",
            "organiser": Identity.generate(bytes(32)).peer_id,
            "model": {**MODEL, **cell.model},
            "tokenizer": {"blob": ZERO},
            "data": {"kind": "local", "heldout": ZERO, "heldout_tokens": HELDOUT_TOKENS, "train_tokens": 0},
            "inner": {**inner, **cell.inner},
            # A round per iteration and nobody to exchange with: what is left of rounds is the learning rate's end.
            "sync": {
                "algorithm": "local",
                "inner_steps": 1,
                "total_rounds": cell.steps,
                "decay_rounds": int(DECAY_SHARE * cell.steps),
            },
            "pipeline": {**PIPELINE, "skip_ratio": cell.skip_ratio, **cell.pipeline},
            "initial_state": {"seed": cell.seed, "sha256": ZERO},
        }
    )


class Pipeline:
    """All stages of a run, one replica each.

    Args:
        manifest: the run.
    """

    def __init__(self, manifest: Manifest) -> None:
        spec = manifest.pipeline
        self.trainers = [StageTrainer(manifest, stage=stage) for stage in range(spec.stages)]
        shape = (spec.microbatch_sequences, manifest.inner.sequence_tokens, manifest.model.hidden_size)
        self._codec = ActivationCodec(spec.codec, shape)

    @property
    def stages(self) -> list[Stage]:
        """The model's parts, in order."""
        return [trainer.worker.stage for trainer in self.trainers]

    def iterate(self, number: int, batches: Sequence[Tensor], orders: Sequence[Sequence[int]]) -> list[float]:
        """One iteration: all microbatches out and back, then the inner step of every stage.

        Args:
            number: which one, from 0.
            batches: token ids [B, T + 1] of each microbatch.
            orders: the stages that each visits.

        Returns:
            Mean loss of each microbatch, nats per token.
        """
        losses = [
            self._visit(("origin", microbatch), tokens, order)
            for microbatch, (tokens, order) in enumerate(zip(batches, orders, strict=True))
        ]
        for trainer in self.trainers:
            trainer.enter(number)
            trainer.step(least_tokens=1)
        return losses

    def _visit(self, key: tuple[str, int], tokens: Tensor, order: Sequence[int]) -> float:
        path = [self.trainers[stage].worker for stage in order]
        hidden = tokens
        for worker in path:
            hidden = self._sent(worker.forward(key, hidden))
        loss, gradient = path[0].loss(key, hidden)
        for worker in reversed(path):
            onward = worker.backward(key, self._sent(gradient))
            worker.commit(key)
            gradient = gradient if onward is None else onward
        return loss

    def _sent(self, tensor: Tensor) -> Tensor:
        """What of a tensor arrives at the next peer."""
        return self._codec.decode(self._codec.encode(tensor))


def paths(manifest: Manifest, *, swaps: bool) -> Iterator[list[list[int]]]:
    """The orders of stages of every iteration's microbatches, drawn as a live run without a plan draws them."""
    spec = manifest.pipeline
    peers = {PeerId(f"stage-{stage}"): stage for stage in range(spec.stages)}
    stages = StageMap(num_stages=spec.stages, path_length=spec.path_length)
    stages.update({peer: Replica(stage=stage) for peer, stage in peers.items()})
    origin = f"{manifest.initial_state.seed}"
    for iteration in itertools.count():
        stages.begin_iteration()
        drawn = [
            stages.path(PeerId("stage-0"), lot=f"{origin}/{iteration}/{microbatch}")
            for microbatch in range(spec.microbatches)
        ]
        orders = [[peers[peer] for peer in path] for path in drawn]
        yield orders if swaps else [sorted(order) for order in orders]


def train(cell: Cell, tokens: Tokens) -> tuple[Pipeline, dict[str, Any]]:
    """Train on these tokens.

    Returns:
        The stages, and `tokens` (that the model was trained on), `visits` (microbatches per stage), `swapped` (share of the
        microbatches that visited stages out of order) and `train_losses` (mean of each iteration).
    """
    manifest = manifest_of(cell)
    spec, sequence_tokens = manifest.pipeline, manifest.inner.sequence_tokens
    pipeline, orders = Pipeline(manifest), paths(manifest, swaps=cell.swaps)
    source = RoundBatches(tokens, seed=1000 * cell.seed, sequence_tokens=sequence_tokens)
    visits, num_swapped, train_losses = [0] * spec.stages, 0, []
    for iteration in range(cell.steps):
        batches = [source.next(spec.microbatch_sequences) for _ in range(spec.microbatches)]
        drawn = next(orders)
        train_losses.append(statistics.fmean(pipeline.iterate(iteration, batches, drawn)))
        for order in drawn:
            num_swapped += order != sorted(order)
            for stage in order:
                visits[stage] += 1
    return pipeline, {
        "tokens": source.cursor * sequence_tokens,
        "visits": visits,
        "swapped": num_swapped / visits[0],
        "train_losses": train_losses,
    }


def omitted_subsets(num_stages: int, count: int) -> list[tuple[int, ...]]:
    """Sets of `count` stages to leave out, never stage 0, and every other one equally often: a random set, turned round."""
    others = num_stages - 1
    first = random.Random(f"omitted/{num_stages}/{count}").sample(range(others), count)
    turned = ({(place + shift) % others + 1 for place in first} for shift in range(max(others, 1)))
    return sorted({tuple(sorted(each)) for each in turned})


@torch.no_grad()
def _heldout_loss(stages: Sequence[Stage], heldout: Tokens, sequence_tokens: int) -> float:
    """Nats per token."""
    total, count = 0.0, 0
    for batch in heldout_batches(heldout, sequence_tokens=sequence_tokens, num_sequences=EVALUATION_SEQUENCES):
        total += float(run_path(stages, batch)) * len(batch)
        count += len(batch)
    return total / count


def _omitted_losses(stages: Sequence[Stage], heldout: Tokens, sequence_tokens: int) -> list[dict[str, Any]]:
    """By number of omitted stages: mean and standard deviation over the subsets, and how many there are."""
    found = []
    for count in range(len(stages)):
        losses = [
            _heldout_loss([stage for stage in stages if stage.number not in subset], heldout, sequence_tokens)
            for subset in omitted_subsets(len(stages), count)
        ]
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
        found.append(
            {"count": count, "loss": statistics.fmean(losses), "subset_std": deviation, "subsets": len(losses)}
        )
    return found


def _compute_saved(manifest: Manifest, visits: Sequence[int], stages: Sequence[Stage]) -> float:
    """Share of a full pipeline's multiplications that was not done: those with matrices, the head included, which none skips."""
    head = manifest.model.vocab_size * manifest.model.hidden_size
    layers = [sum(p.numel() for layer in stage.model.layers.values() for p in layer.parameters()) for stage in stages]
    done = sum(math.prod(pair) for pair in zip(visits, layers, strict=True)) + visits[0] * head
    return 1.0 - done / (visits[0] * (sum(layers) + head))


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train, and measure on the held-out text.

    Returns:
        `loss` of the whole model, `omitted` (its loss by number of omitted stages), `train_loss` (mean over the last tenth of
        the iterations, along the paths that were trained), `tokens`, `visits`, `swapped`, `compute_saved` and `seconds`.
    """
    torch.set_num_threads(1)  # several runs share the machine, and matrices this small gain nothing from more
    started_s = time.perf_counter()
    train_tokens, heldout = texts()
    manifest = manifest_of(cell)
    pipeline, trained = train(cell, train_tokens)
    train_losses = trained.pop("train_losses")
    omitted = _omitted_losses(pipeline.stages, heldout[:HELDOUT_TOKENS], manifest.inner.sequence_tokens)
    return trained | {
        "loss": omitted[0]["loss"],
        "train_loss": statistics.fmean(train_losses[-max(1, len(train_losses) // 10) :]),
        "omitted": omitted,
        "parameters": manifest.model.num_parameters,
        "stages": manifest.pipeline.stages,
        "path_length": manifest.pipeline.path_length,
        "compute_saved": _compute_saved(manifest, trained["visits"], pipeline.stages),
        "seconds": round(time.perf_counter() - started_s, 1),
    }
