"""Shapes, presets and the memory estimate."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from model.config import PRESETS, ModelConfig
from model.errors import DataError
from model.optim import InnerConfig
from model.transformer import Transformer
from protocol.manifest import InnerSpec, ModelSpec
from tests.model.shapes import small_config, small_model

NOMINAL = {
    "1m": 0.9e6, "3m": 3e6, "10m": 10e6, "25m": 25e6, "50m": 50e6, "100m": 100e6, "300m": 300e6,
    "1b": 1.1e9, "3b": 3.2e9, "8b": 8.03e9,
}  # fmt: skip


@pytest.mark.parametrize("name", list(NOMINAL))
def test_preset_has_its_nominal_size(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        model = Transformer(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert config.num_parameters == counted
    assert counted == pytest.approx(NOMINAL[name], rel=0.1)


@pytest.mark.parametrize("name", list(NOMINAL))
def test_preset_is_a_valid_manifest_section(name: str) -> None:
    spec = ModelSpec(**dataclasses.asdict(PRESETS[name]))
    assert spec.num_parameters == PRESETS[name].num_parameters


def test_field_names_are_the_manifests() -> None:
    assert {field.name for field in dataclasses.fields(ModelConfig)} == set(ModelSpec.model_fields)
    assert {field.name for field in dataclasses.fields(InnerConfig)} == set(InnerSpec.model_fields)


@pytest.mark.parametrize(
    "change",
    [{"num_heads": 5}, {"num_kv_heads": 3}, {"hidden_size": 20}, {"num_layers": 0}, {"vocab_size": 257}],
)
def test_impossible_shape_is_refused_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        dataclasses.replace(small_config(), **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [PRESETS["1m"], PRESETS["3m"], small_config(tie=False)])
def test_activation_estimate_is_close_to_what_autograd_saves(config: ModelConfig) -> None:
    model = small_model(config)
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(torch.zeros(4, 65, dtype=torch.int64))
    assert loss.requires_grad
    assert config.activation_bytes(4 * 64) == pytest.approx(sum(saved.values()), rel=0.5)


def test_memory_grows_with_optimizer_and_batch() -> None:
    config = PRESETS["50m"]
    base = config.memory_bytes(num_sequences=4, sequence_tokens=512)
    assert config.memory_bytes(num_sequences=8, sequence_tokens=512) > base
    saved = base - config.memory_bytes(num_sequences=4, sequence_tokens=512, optimizer_state_bytes=2)
    assert saved == 6 * config.num_parameters
