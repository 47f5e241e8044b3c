"""The partial-pipeline benchmark trains what a live run trains, and gives every method the same tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from model.batches import RoundBatches
from model.data import Tokens
from model.initial import initialise
from model.optim import build_optimizer, learning_rate, set_learning_rate
from model.stage import Stage, run_path
from model.transformer import Transformer
from node.pipeline.rules import is_order
from node.training_state import inner_config, model_config
from protocol.manifest import PipelineSpec
from tests.benchmarks import partial
from tests.benchmarks.partial_cell import Cell, cell_key, manifest_of, omitted_subsets, paths, train

TINY = Cell(
    method="full",
    seed=3,
    steps=6,
    lr=0.01,
    swaps=False,
    model={"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_layers": 4, "num_heads": 2}
    | {"num_kv_heads": 1},
    inner={"sequence_tokens": 16, "warmup_steps": 2, "clip_norm": 1e9},
    pipeline={"stages": 4, "microbatches": 3, "codec": "fp32"},
)
PER_ITERATION = 3 * 2 * 16


@pytest.fixture(scope="module")
def text() -> Tokens:
    """Tokens of which the next one is often the same."""
    generator = np.random.default_rng(5)
    return np.repeat(generator.integers(300, size=2000, dtype=np.uint16), 3)


def losses_of_the_unsplit_model(cell: Cell, tokens: Tokens) -> list[float]:
    """Mean loss of each iteration, trained with the mean gradient over the iteration's sequences."""
    manifest = manifest_of(cell)
    config = inner_config(manifest)
    whole = Transformer(model_config(manifest))
    initialise(whole, cell.seed)
    optimizer = build_optimizer(whole, config)
    source = RoundBatches(tokens, seed=1000 * cell.seed, sequence_tokens=config.sequence_tokens)
    losses = []
    for step in range(cell.steps):
        rate = learning_rate(step, config=config, total_steps=cell.steps, decay_steps=manifest.sync.decay_rounds)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad()
        loss = whole.loss(source.next(6))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_without_skipping_it_is_the_unsplit_model_step_for_step(text: Tokens) -> None:
    _, trained = train(TINY, text)
    assert trained["train_losses"] == pytest.approx(losses_of_the_unsplit_model(TINY, text), abs=2e-4)
    _, skipping = train(replace(TINY, skip_ratio=0.25), text)
    assert skipping["train_losses"][-1] != pytest.approx(trained["train_losses"][-1], abs=2e-4)


def losses_of_plain_autograd(cell: Cell, tokens: Tokens) -> list[float]:
    """The same along the cell's paths: each stage's gradient a mean over the microbatches that visited it, clipped by itself."""
    manifest = manifest_of(cell)
    config, spec = inner_config(manifest), manifest.pipeline
    stages = [Stage(model_config(manifest), number, spec.stages) for number in range(spec.stages)]
    for stage in stages:
        initialise(stage, cell.seed)
    optimizers = [build_optimizer(stage, config) for stage in stages]
    source = RoundBatches(tokens, seed=1000 * cell.seed, sequence_tokens=config.sequence_tokens)
    losses = []
    for step, orders in enumerate(islice(paths(manifest, swaps=cell.swaps), cell.steps)):
        rate = learning_rate(step, config=config, total_steps=cell.steps, decay_steps=manifest.sync.decay_rounds)
        each = [run_path([stages[number] for number in order], source.next(2)) for order in orders]
        torch.stack(each).sum().backward()  # type: ignore[no-untyped-call]
        for stage, optimizer in zip(stages, optimizers, strict=True):
            visits = sum(stage.number in order for order in orders)
            for parameter in stage.parameters() if visits else ():
                assert parameter.grad is not None
                parameter.grad /= visits
            set_learning_rate(optimizer, rate)
            torch.nn.utils.clip_grad_norm_(stage.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(torch.stack(each).mean().item())
    return losses


def test_with_skipping_and_swaps_it_is_plain_autograd_along_the_same_paths(text: Tokens) -> None:
    cell = replace(TINY, skip_ratio=0.25, swaps=True, inner={**TINY.inner, "clip_norm": 0.3})
    _, trained = train(cell, text)
    assert trained["swapped"] > 0
    assert trained["train_losses"] == pytest.approx(losses_of_plain_autograd(cell, text), abs=2e-4)


def test_every_method_has_the_same_tokens_and_each_stage_counts_its_own(text: Tokens) -> None:
    for skip_ratio, length in ((0.0, 4), (0.25, 3), (0.5, 2)):
        pipeline, trained = train(replace(TINY, skip_ratio=skip_ratio, swaps=True), text)
        assert trained["tokens"] == pipeline.trainers[0].tokens == TINY.steps * PER_ITERATION
        assert sum(trained["visits"]) == TINY.steps * 3 * length
        assert [trainer.tokens for trainer in pipeline.trainers] == [2 * 16 * count for count in trained["visits"]]


def test_without_swaps_the_same_stages_are_visited_in_ascending_order() -> None:
    manifest = manifest_of(partial.METHODS["skip 33 %"])
    with_swaps, without = (
        [order for iteration in islice(paths(manifest, swaps=swaps), 50) for order in iteration]
        for swaps in (True, False)
    )
    assert [sorted(order) for order in with_swaps] == without
    assert all(is_order(order) and len(order) == 8 for order in with_swaps + without)
    assert 0.1 < sum(order != sorted(order) for order in with_swaps) / len(with_swaps) < 0.5
    assert {stage for order in without for stage in order} == set(range(12))


@pytest.mark.parametrize("count", range(12))
def test_omitted_stages_never_include_stage_0_and_all_others_equally_often(count: int) -> None:
    subsets = omitted_subsets(12, count)
    assert all(len(set(subset)) == count for subset in subsets)
    assert len(set(subsets)) == len(subsets) == (11 if 0 < count < 11 else 1)
    often = [sum(stage in subset for subset in subsets) for stage in range(12)]
    assert often == [0] + [count * len(subsets) // 11] * 11


def test_the_methods_are_what_their_names_say() -> None:
    lengths = {name: manifest_of(cell).pipeline.path_length for name, cell in partial.METHODS.items()}
    assert sorted(lengths.values()) == [8, 8, 9, 9, 12]
    assert lengths["full"] == 12
    assert manifest_of(partial.METHODS["full"]).model.num_parameters >= 3_000_000
    for cell in partial.METHODS.values():
        spec = manifest_of(cell).pipeline
        assert (spec.codec, spec.microbatches) == (PipelineSpec().codec, PipelineSpec().microbatches)
    assert len({cell_key(cell) for cell in partial.cells(partial.METHODS, seeds=3, steps=650)}) == 15


def line(cell: Cell, loss: float) -> dict[str, Any]:
    omitted = [{"count": count, "loss": loss + count, "subset_std": 0.1, "subsets": 3} for count in range(3)]
    fields = {"stages": 4, "path_length": 3, "parameters": 9, "tokens": 5, "swapped": 0.0, "seconds": 1.0}
    return {"loss": loss, "omitted": omitted, "compute_saved": 0.25, "cell": {"lr": cell.lr}, **fields}


def test_summary_compares_equal_seeds_and_leaves_out_what_was_not_run() -> None:
    sweep = partial.cells(["full", "skip 25 %", "skip 33 %"], seeds=2, steps=partial.STEPS)
    losses = {("full", 0): 3.0, ("full", 1): 3.5, ("skip 25 %", 1): 3.6}
    known = {
        cell_key(cell): line(cell, loss) for cell in sweep if (loss := losses.get((cell.method, cell.seed))) is not None
    }
    table = partial.summary(sweep, known)
    assert list(table) == ["full", "skip 25 %"]
    assert table["full"]["loss"] == 3.25
    assert table["full"]["perplexity_ratio"] == 1.0
    assert table["skip 25 %"]["perplexity_ratio"] == round(math.exp(0.1), 4)
    assert table["skip 25 %"]["seeds"] == [1]
    assert table["full"]["omitted"][2] == {
        "count": 2,
        "loss": 5.25,
        "loss_std": round(0.5 / math.sqrt(2), 4),
        "perplexity_ratio": round(math.exp(2), 4),
    }
