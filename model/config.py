"""The model's shape, named presets from one million to eight billion parameters, and what they cost in memory.

The field names are those of the run manifest, and each maps onto one field of Hugging Face's `LlamaConfig` (see
model/export.py). The two largest presets have the shapes of published models, so that their weights can be loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import DataError

__all__ = ["PRESETS", "ModelConfig", "training_bytes_per_parameter"]

_REPLICA_BYTES = 4 * 6
"""θ, its gradient, φ, δ, the anchor and the error-feedback residual, in fp32."""


def training_bytes_per_parameter(optimizer_state_bytes: float) -> float:
    """What a replica keeps per parameter, of the whole model or of a part of it; see `ModelConfig.memory_bytes`."""
    return _REPLICA_BYTES + optimizer_state_bytes


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama-style decoder.

    Args:
        vocab_size: number of tokens, at least 258 (256 bytes, one special token, one merge).
        hidden_size: width of the residual stream; divisible by `num_heads`.
        intermediate_size: width of the SwiGLU layer.
        num_layers: number of decoder layers.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads; divides `num_heads`.
        max_sequence_tokens: longest context in tokens.
        rope_theta: base of the rotary embedding.
        norm_eps: epsilon of RMSNorm.
        tie_embeddings: whether the head shares the embedding matrix.

    Raises:
        DataError: the numbers do not make a decoder.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_sequence_tokens: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.intermediate_size, self.num_layers, self.num_heads, self.num_kv_heads)
        if min(sizes) < 1 or self.vocab_size < 258 or self.max_sequence_tokens < 1:
            raise DataError("model: every size must be positive and vocab_size at least 258; correct the model section")
        if self.hidden_size % self.num_heads or self.head_dim % 2:
            raise DataError("model: hidden_size / num_heads must be an even whole number; correct the model section")
        if self.num_heads % self.num_kv_heads:
            raise DataError("model: num_heads must be a multiple of num_kv_heads; correct the model section")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters, tied embeddings counted once."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * layer + self.hidden_size

    def memory_bytes(self, *, num_sequences: int, sequence_tokens: int, optimizer_state_bytes: float = 8.0) -> int:
        """Estimate what a whole replica needs while it trains in fp32 and exchanges.

        Args:
            num_sequences: sequences per step.
            sequence_tokens: tokens per sequence.
            optimizer_state_bytes: optimizer state per parameter; 8 for AdamW, about 2 for 8-bit AdamW.

        Returns:
            Bytes for weights, gradients, optimizer, φ, δ, residual, anchor and the activations of one step.
        """
        parameters = int(self.num_parameters * training_bytes_per_parameter(optimizer_state_bytes))
        return parameters + self.activation_bytes(num_sequences * sequence_tokens)

    def activation_bytes(self, num_tokens: int) -> int:
        """Estimate the bytes kept for the backward pass of one step over `num_tokens` tokens, in fp32.

        Per token and layer: the residual stream and its normed copy twice, queries, keys and values before and after rotation,
        the attention's output, and four arrays as wide as the feed-forward layer.
        """
        kv_width = self.num_kv_heads * self.head_dim
        layer = 7 * self.hidden_size + 3 * kv_width + 4 * self.intermediate_size
        return 4 * num_tokens * (self.num_layers * layer + 2 * self.hidden_size + min(self.vocab_size, 8192))


def _preset(shape: tuple[int, int, int, int, int, int], context: int, **more: float | bool) -> ModelConfig:
    vocab, hidden, intermediate, layers, heads, kv_heads = shape
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        max_sequence_tokens=context,
        rope_theta=float(more.get("rope_theta", 10_000.0)),
        tie_embeddings=bool(more.get("tie_embeddings", True)),
    )


PRESETS: dict[str, ModelConfig] = {
    "1m": _preset((1024, 128, 384, 4, 4, 2), 256),
    "3m": _preset((2048, 192, 512, 6, 6, 2), 512),
    "10m": _preset((4096, 384, 896, 6, 6, 2), 1024),
    "25m": _preset((8192, 512, 1152, 8, 8, 4), 1024),
    "50m": _preset((16384, 640, 1920, 8, 10, 5), 2048),
    "100m": _preset((32000, 768, 2048, 12, 12, 4), 2048),
    "300m": _preset((32000, 1024, 2816, 24, 16, 4), 2048),
    "1b": _preset((32000, 2048, 5632, 22, 32, 4), 2048, tie_embeddings=False),
    "3b": _preset((128256, 3072, 8192, 28, 24, 8), 8192, rope_theta=500_000.0),
    "8b": _preset((128256, 4096, 14336, 32, 32, 8), 8192, rope_theta=500_000.0, tie_embeddings=False),
}
"""Shapes by name: vocabulary, width, feed-forward width, layers, heads, key/value heads; then the context in tokens."""
