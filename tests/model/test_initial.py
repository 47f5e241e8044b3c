"""Initial weights: the same bits for ever, and the right distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.config import PRESETS
from model.initial import initial_sha256, initialise, weights_sha256
from model.transformer import Transformer
from tests.model.shapes import small_config, small_model

# Written down once. If this changes, runs that were published before can no longer be started.
SMALL_SHA256 = "66e0dbc2bef08aa34d1d239c1470fd00b1a0bef9e5a1fd0ee1cab2b5d9494647"


def test_bits_never_change() -> None:
    assert weights_sha256(small_model(seed=7).state_dict()) == SMALL_SHA256


def test_seed_and_name_choose_the_bits() -> None:
    first, second = small_model(seed=1), small_model(seed=2)
    assert weights_sha256(first.state_dict()) == weights_sha256(small_model(seed=1).state_dict())
    assert weights_sha256(first.state_dict()) != weights_sha256(second.state_dict())
    layers = first.model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)  # type: ignore[union-attr, arg-type]


def test_distribution() -> None:
    config = PRESETS["1m"]
    model = small_model(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert bool((parameter == 1).all())
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02
        values = parameter.detach()
        assert float(values.std()) == pytest.approx(std, rel=0.03)
        assert abs(float(values.mean())) < 0.05 * std
        assert float(values.abs().max()) <= std * math.sqrt(3)


def test_memory_layout_of_the_parameters_does_not_matter() -> None:
    model = Transformer(small_config())
    flat = torch.zeros(sum(p.numel() for p in model.parameters()))
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    initialise(model, 7)
    assert weights_sha256(dict(model.named_parameters())) == SMALL_SHA256


def test_hash_sees_names_shapes_and_values() -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    hashes = {
        weights_sha256({"a": tensor}),
        weights_sha256({"b": tensor}),
        weights_sha256({"a": tensor.view(2, 3)}),
        weights_sha256({"a": tensor + 1}),
    }
    assert len(hashes) == 4
    two = {"a": tensor, "b": tensor}
    assert weights_sha256(two) == weights_sha256(dict(reversed(two.items())))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_hash_can_be_had_without_the_model(tie_embeddings: bool) -> None:
    config = replace(small_model(seed=7).config, tie_embeddings=tie_embeddings)
    whole = Transformer(config)
    initialise(whole, seed=7)
    assert initial_sha256(config, 7) == weights_sha256(dict(whole.named_parameters()))
