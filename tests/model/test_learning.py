"""The whole path on real text: tokenizer, shards, batches, optimizer, held-out loss."""

from __future__ import annotations

import pytest
import torch

from model.batches import RoundBatches, heldout_batches
from model.config import PRESETS, ModelConfig
from model.corpus import iter_stdlib, sample_texts
from model.data import build_dataset, decode_tokens
from model.optim import InnerConfig, build_optimizer, learning_rate, set_learning_rate
from model.tokenizer import Tokenizer, train_tokenizer
from model.transformer import Transformer
from tests.model.shapes import small_model


def heldout_loss(model: Transformer, heldout: bytes) -> float:
    tokens = decode_tokens(heldout, model.config.vocab_size)
    with torch.no_grad():
        losses = [model.loss(batch) for batch in heldout_batches(tokens, sequence_tokens=64, num_sequences=16)]
    return float(torch.stack(losses).mean())


def train(config: ModelConfig, *, num_steps: int, max_chars: int) -> tuple[float, float]:
    """Held-out loss before and after training on the standard library."""
    texts = list(iter_stdlib(max_chars=max_chars))
    tokenizer = Tokenizer(train_tokenizer(sample_texts(texts, 1 << 20), config.vocab_size))
    dataset = build_dataset(texts, tokenizer, shard_tokens=1 << 18, heldout_tokens=4097)
    tokens = decode_tokens(b"".join(dataset.shards), config.vocab_size)
    inner = InnerConfig(lr=3e-3, sequence_tokens=64, warmup_steps=20)
    batches = RoundBatches(tokens, seed=1, sequence_tokens=inner.sequence_tokens)
    model = small_model(config)
    optimizer = build_optimizer(model, inner)
    start = heldout_loss(model, dataset.heldout)
    for step in range(num_steps):
        set_learning_rate(optimizer, learning_rate(step, config=inner))
        optimizer.zero_grad()
        torch.autograd.backward([model.loss(batches.next(16))])
        torch.nn.utils.clip_grad_norm_(model.parameters(), inner.clip_norm)
        optimizer.step()
    return start, heldout_loss(model, dataset.heldout)


def test_a_tiny_model_learns_in_seconds() -> None:
    tiny = ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2, num_kv_heads=1)
    start, end = train(tiny, num_steps=60, max_chars=1 << 20)
    assert start == pytest.approx(6.24, abs=0.1)  # ln 512
    assert end < 0.85 * start


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_smallest_preset_reaches_the_demos_mark() -> None:
    start, end = train(PRESETS["1m"], num_steps=250, max_chars=8 << 20)
    assert end < 0.65 * start
