"""The decoder's own properties; its agreement with transformers is in test_export.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from model.attention import KeyValueCache
from model.head_loss import head_loss
from tests.model.shapes import small_config, small_model


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = 300) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_names_are_hugging_faces() -> None:
    names = set(small_model(small_config(tie=False)).state_dict())
    layer = {
        f"model.layers.{i}.{part}.weight"
        for i in range(2)
        for part in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    assert names == layer | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names - {"lm_head.weight"} == set(small_model(small_config(tie=True)).state_dict())


def test_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model, tokens = small_model(), random_tokens(3, 17)
    logits = model(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model.loss(tokens), expected)
    assert float(model.loss(tokens).detach()) == pytest.approx(5.7, abs=0.1)  # ln 300: untrained weights know nothing


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = small_model(), random_tokens(2, 20)
    changed = tokens.clone()
    changed[:, 12:] = random_tokens(2, 8, seed=9)
    torch.testing.assert_close(model(tokens)[:, :12], model(changed)[:, :12], rtol=0, atol=1e-6)
    assert not torch.allclose(model(tokens)[:, 12:], model(changed)[:, 12:])


@pytest.mark.parametrize("pieces", [[1] * 20, [7, 13], [5, 1, 1, 9, 4]])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_cached_logits_equal_a_whole_pass(pieces: list[int], num_kv_heads: int) -> None:
    config = small_config(num_kv_heads=num_kv_heads)
    model, tokens = small_model(config), random_tokens(2, 20)
    cache = KeyValueCache(config, num_sequences=2, max_tokens=20)
    with torch.no_grad():
        parts = [model(part, cache) for part in torch.split(tokens, pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-5, atol=1e-6)


def test_longer_text_than_the_context_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="max_sequence_tokens"):
        small_model()(random_tokens(1, 65))


@pytest.mark.parametrize("num_positions", [1, 255, 256, 700])
def test_chunked_head_equals_the_plain_one(num_positions: int) -> None:
    source = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_positions, 16, generator=source, dtype=torch.float32).requires_grad_()
    weight = (torch.randn(8200, 16, generator=source) * 0.3).requires_grad_()
    targets = torch.randint(0, 8200, (num_positions,), generator=source)
    got = head_loss(hidden, weight, targets)
    got_grads = torch.autograd.grad(got * 3, (hidden, weight))
    expected = F.cross_entropy(F.linear(hidden, weight), targets)
    expected_grads = torch.autograd.grad(expected * 3, (hidden, weight))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for mine, reference in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-7)


def test_chunked_head_makes_no_gradients_when_none_are_wanted() -> None:
    hidden, weight = torch.ones(4, 16), torch.ones(8200, 16)
    loss = head_loss(hidden, weight, torch.zeros(4, dtype=torch.int64))
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(9.0119, abs=1e-3)


def test_bf16_autocast_stays_close() -> None:
    model, tokens = small_model(small_config(vocab_size=8200)), random_tokens(2, 33, vocab_size=8200)
    exact = model.loss(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.loss(tokens)
    torch.autograd.backward([rough])
    assert rough.dtype == torch.float32
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), abs=0.02)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
