"""Small models that the tests share."""

from __future__ import annotations

from model.config import ModelConfig
from model.initial import initialise
from model.transformer import Transformer

__all__ = ["TEXTS", "small_config", "small_model"]

TEXTS = [
    f"Chapter {i}. The {i}th swarm of bees flew over {i * i} fields; naïve crows said “{i % 7}”.\n" * 9
    for i in range(80)
]


def small_config(*, vocab_size: int = 300, num_kv_heads: int = 2, tie: bool = True, context: int = 64) -> ModelConfig:
    """A decoder of two layers and four heads."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        max_sequence_tokens=context,
        tie_embeddings=tie,
    )


def small_model(config: ModelConfig | None = None, *, seed: int = 0) -> Transformer:
    """A decoder with initial weights from a seed."""
    model = Transformer(config or small_config())
    initialise(model, seed)
    return model
