"""Muon against torch's own, and where bfloat16 is slow."""

from __future__ import annotations

import pytest
import torch

from model import muon
from model.muon import MuonWithAdamW, orthogonalised

SHAPES = ((24, 40), (40, 24), (16, 16))


def matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], number: int = 4) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(number):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def ours(parameters: list[torch.nn.Parameter], *, momentum: float = 0.9) -> MuonWithAdamW:
    rest = [{"params": [torch.nn.Parameter(torch.zeros(3))], "weight_decay": 0.0}]
    return MuonWithAdamW(parameters, rest, lr=0.02, momentum=momentum, weight_decay=0.1, betas=(0.9, 0.95))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.95])
def test_where_bfloat16_is_fast_it_is_torch_s_to_the_bit(monkeypatch: pytest.MonkeyPatch, momentum: float) -> None:
    monkeypatch.setattr(muon, "_fast_dtype", lambda device: torch.bfloat16)
    mine, theirs = matrices(), matrices()
    steps(ours(mine, momentum=momentum), mine)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=momentum, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    steps(reference, theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)


def test_elsewhere_it_is_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(muon, "_fast_dtype", lambda device, dtype=dtype: dtype)
        parameters = matrices()
        steps(ours(parameters), parameters)
        found.append(parameters)
    for exact, rounded in zip(*found, strict=True):
        torch.testing.assert_close(exact, rounded, rtol=0.0, atol=4 * 0.02 * 0.2 * 0.1)


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16", None])
def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch, capability: str | None) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True} if capability else {})
    muon._fast_dtype.cache_clear()
    expected = torch.bfloat16 if capability else torch.float32
    assert muon._fast_dtype(torch.device("cpu")) == expected
    muon._fast_dtype.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
def test_all_directions_come_out_alike(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    values = torch.linalg.svdvals(orthogonalised(matrix, dtype=torch.float32))
    assert float(values.min()) > 0.4
    assert float(values.max()) < 1.3


def test_a_gradient_of_zeros_moves_nothing_but_by_decay() -> None:
    parameters = matrices()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = ours(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old * (1 - 0.02 * 0.1))
