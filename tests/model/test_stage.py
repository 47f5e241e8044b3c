"""A model in stages is the same model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.errors import DataError
from model.initial import initialise
from model.stage import Stage, run_path, stage_layers
from model.transformer import Transformer
from protocol.manifest import ModelSpec

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 6,
    "num_heads": 4,
    "num_kv_heads": 2,
}
TIED = ModelConfig(**SHAPE, max_sequence_tokens=32)
UNTIED = ModelConfig(**SHAPE, max_sequence_tokens=32, tie_embeddings=False)


def whole_and_stages(config: ModelConfig, num_stages: int) -> tuple[Transformer, list[Stage]]:
    whole = Transformer(config)
    initialise(whole, seed=3)
    stages = [Stage(config, number, num_stages) for number in range(num_stages)]
    for stage in stages:
        initialise(stage, seed=3)
    return whole, stages


def tokens(config: ModelConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [TIED, UNTIED])
@pytest.mark.parametrize("num_stages", [1, 2, 4, 6])
def test_all_stages_together_hold_the_whole_models_weights(config: ModelConfig, num_stages: int) -> None:
    whole, stages = whole_and_stages(config, num_stages)
    joined = {name: value for stage in stages for name, value in stage.state_dict().items()}
    assert sum(len(stage.state_dict()) for stage in stages) == len(joined)
    assert {name: value.tolist() for name, value in joined.items()} == {
        name: value.tolist() for name, value in whole.state_dict().items()
    }


@pytest.mark.parametrize("config", [TIED, UNTIED])
@pytest.mark.parametrize("num_stages", range(1, 7))
def test_the_manifest_knows_how_large_the_smallest_is(config: ModelConfig, num_stages: int) -> None:
    spec = ModelSpec(**dataclasses.asdict(config))
    _, stages = whole_and_stages(config, num_stages)
    assert spec.smallest_stage(num_stages) == min(sum(p.numel() for p in stage.parameters()) for stage in stages)


@pytest.mark.parametrize("config", [TIED, UNTIED])
@pytest.mark.parametrize("num_stages", [1, 3, 6])
def test_loss_and_gradients_are_the_whole_models(config: ModelConfig, num_stages: int) -> None:
    whole, stages = whole_and_stages(config, num_stages)
    batch = tokens(config)
    whole_loss, loss = whole.loss(batch), run_path(stages, batch)
    whole_loss.backward()  # type: ignore[no-untyped-call]
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(whole_loss.item(), abs=1e-6)
    expected = dict(whole.named_parameters())
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-6, rtol=1e-5)


def test_a_skipped_stage_is_the_identity_and_order_matters() -> None:
    whole, stages = whole_and_stages(TIED, 3)
    batch = tokens(TIED)
    skipped = run_path([stages[0], stages[2]], batch)
    with torch.no_grad():
        for layer in (2, 3):  # the layers of stage 1 add nothing now
            for output in ("self_attn.o_proj", "mlp.down_proj"):
                whole.get_parameter(f"model.layers.{layer}.{output}.weight").zero_()
    assert skipped.item() == pytest.approx(whole.loss(batch).item(), abs=1e-6)
    swapped = run_path([stages[0], stages[2], stages[1]], batch)
    assert swapped.item() != run_path(stages, batch).item()


@pytest.mark.parametrize("num_layers", range(1, 30))
def test_layers_are_dealt_out_evenly_and_stage_0_gets_the_fewest(num_layers: int) -> None:
    for num_stages in range(1, num_layers + 1):
        parts = stage_layers(num_layers, num_stages)
        sizes = [len(part) for part in parts]
        assert [layer for part in parts for layer in part] == list(range(num_layers))
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] == min(sizes)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(DataError, match="6 layers can not make 7 stages; choose between 1 and 6"):
        Stage(TIED, 0, 7)
