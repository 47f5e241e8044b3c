"""Inner optimizer and learning rate."""

from __future__ import annotations

import sys

import pytest
import torch

from model.errors import DataError
from model.optim import InnerConfig, build_optimizer, learning_rate, set_learning_rate, state_bytes_per_parameter
from tests.model.shapes import small_model

CONFIG = InnerConfig(lr=0.01, sequence_tokens=16, warmup_steps=10)


def test_weight_decay_spares_norms() -> None:
    model = small_model()
    matrices, norms = build_optimizer(model, CONFIG).param_groups
    assert matrices["weight_decay"] == CONFIG.weight_decay
    assert norms["weight_decay"] == 0
    assert len(norms["params"]) == 2 * 2 + 1
    assert len(matrices["params"]) + len(norms["params"]) == len(list(model.parameters()))


def test_a_few_steps_overfit_one_batch() -> None:
    model = small_model()
    optimizer = build_optimizer(model, CONFIG)
    tokens = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    start = float(model.loss(tokens).detach())
    for _ in range(30):
        optimizer.zero_grad()
        torch.autograd.backward([model.loss(tokens)])
        optimizer.step()
    assert float(model.loss(tokens).detach()) < 0.5 * start


def test_warmup_stable_decay() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, config=CONFIG, total_steps=100, decay_steps=20)

    assert rate(0) == pytest.approx(0.001)
    assert rate(9) == rate(50) == rate(80) == 0.01
    assert rate(90) == pytest.approx(0.0055)
    assert rate(100) == rate(500) == pytest.approx(0.001)


def test_endless_runs_stay_on_the_plateau() -> None:
    assert learning_rate(10**9, config=CONFIG) == 0.01
    assert learning_rate(0, config=InnerConfig(lr=0.01, sequence_tokens=16, warmup_steps=0)) == 0.01


def test_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(small_model(), CONFIG)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_eight_bit_states_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(DataError, match="pip install bitsandbytes"):
        build_optimizer(small_model(), InnerConfig(lr=0.01, sequence_tokens=16, optimizer="adamw8bit"))


def test_unknown_optimizer() -> None:
    with pytest.raises(DataError, match="use adamw"):
        build_optimizer(small_model(), InnerConfig(lr=0.01, sequence_tokens=16, optimizer="sgd"))


def test_muon_moves_the_layers_matrices_and_adamw_the_rest() -> None:
    model = small_model()
    optimizer = build_optimizer(model, InnerConfig(lr=0.01, sequence_tokens=16, optimizer="muon"))
    set_learning_rate(optimizer, 0.02)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tokens = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    start = float(model.loss(tokens).detach())
    torch.autograd.backward([model.loss(tokens)])
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved, state = parameter.detach() - before[name], optimizer.state[parameter]
        is_muons = "layers." in name and parameter.ndim == 2
        assert ("momentum_buffer" in state) == is_muons
        assert ("exp_avg" in state) != is_muons
        if is_muons:  # all directions alike, as long as AdamW's step
            assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * 0.02, rel=0.35)
    for _ in range(30):
        optimizer.zero_grad()
        torch.autograd.backward([model.loss(tokens)])
        optimizer.step()
    assert float(model.loss(tokens).detach()) < 0.5 * start


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_takes_what_is_foreseen(kind: str) -> None:
    model = small_model()
    optimizer = build_optimizer(model, InnerConfig(lr=0.01, sequence_tokens=16, optimizer=kind))
    torch.autograd.backward([model.loss(torch.zeros(2, 17, dtype=torch.int64))])
    optimizer.step()
    held = sum(4 * value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert held / total == pytest.approx(state_bytes_per_parameter(model, kind))


def test_eight_bit_adamw_learns() -> None:
    model = small_model()
    optimizer = build_optimizer(model, InnerConfig(lr=0.01, sequence_tokens=16, optimizer="adamw8bit"))
    tokens = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    start = float(model.loss(tokens).detach())
    for _ in range(30):
        optimizer.zero_grad()
        torch.autograd.backward([model.loss(tokens)])
        optimizer.step()
    assert float(model.loss(tokens).detach()) < 0.6 * start
    assert torch.uint8 in {
        value.dtype for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    }
