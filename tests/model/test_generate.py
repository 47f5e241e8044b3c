"""Sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.errors import DataError
from model.generate import generate
from tests.model.shapes import small_config, small_model


def test_greedy_equals_whole_passes() -> None:
    model, text = small_model(), [5, 9, 77]
    got = list(generate(model, text, max_tokens=12, temperature=0))
    for _ in range(12):
        with torch.no_grad():
            text = [*text, int(model(torch.tensor([text]))[0, -1].argmax())]
    assert got == text[3:]


def test_seed_decides() -> None:
    model = small_model()
    first = list(generate(model, [1], max_tokens=20, seed=3))
    assert first == list(generate(model, [1], max_tokens=20, seed=3))
    assert first != list(generate(model, [1], max_tokens=20, seed=4))


def test_a_small_nucleus_is_greedy() -> None:
    model = small_model()
    greedy = list(generate(model, [1, 2], max_tokens=8, temperature=0))
    assert list(generate(model, [1, 2], max_tokens=8, temperature=1.0, top_p=1e-6)) == greedy


def test_goes_on_past_the_context_from_the_last_half() -> None:
    config = small_config(context=16)
    model = small_model(config)
    prompt = [i % 300 for i in range(40)]
    got = list(generate(model, prompt, max_tokens=50, temperature=0))
    assert len(got) == 50
    with torch.no_grad():
        assert got[0] == int(model(torch.tensor([prompt[-16:]]))[0, -1].argmax())
        text = [*prompt, got[0]]
        assert got[1] == int(model(torch.tensor([text[-8:]]))[0, -1].argmax())


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [([], {}), ([300], {}), ([-1], {}), ([1], {"temperature": -0.1}), ([1], {"top_p": 0.0}), ([1], {"top_p": 1.1})],
)
def test_bad_settings_are_refused_before_anything_runs(prompt: list[int], settings: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        generate(small_model(), prompt, max_tokens=1, **settings)
