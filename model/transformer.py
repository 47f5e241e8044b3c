"""A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied or untied head.

Parameter names and shapes are exactly those of Hugging Face's `LlamaForCausalLM`, so that a checkpoint needs no conversion,
and the arithmetic agrees with it to fp32 rounding (tests/model/test_export.py). Written here instead of imported because the
node trains without `transformers`, and because a small model on a CPU is bound by the number of kernels per layer.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import Attention, KeyValueCache, RotaryTables, rotary_tables
from model.config import ModelConfig
from model.head_loss import head_loss

__all__ = ["Transformer"]


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale by a learnt vector."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `hidden` [..., width]."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self._eps)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform `hidden` [B, T, width]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on a normed copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, hidden: Tensor, tables: RotaryTables, cache: KeyValueCache | None) -> Tensor:
        """Transform `hidden` [B, T, width]."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), tables, cache)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Decoder(nn.Module):
    """Embedding, layers and the final norm: everything below the head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        tables = rotary_tables(config)
        self.register_buffer("cos", tables.cos, persistent=False)
        self.register_buffer("sin", tables.sin, persistent=False)
        self.omitted: frozenset[int] = frozenset()
        """Layers that are left out. A layer adds to the residual stream, so without it the model is a worse one, not a broken
        one."""

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states [B, T, width] of int64 `tokens` [B, T]; positions go on where the cache ends."""
        start = cache.num_tokens if cache is not None else 0
        end = start + tokens.shape[1]
        assert end <= self.cos.shape[0], "more tokens than max_sequence_tokens"
        tables = RotaryTables(self.cos[start:end], self.sin[start:end])
        hidden = self.embed_tokens(tokens)
        for number, layer in enumerate(self.layers):
            if number not in self.omitted:
                hidden = layer(hidden, tables, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        out: Tensor = self.norm(hidden)
        return out


class Transformer(nn.Module):
    """The whole language model. Weights are torch's defaults until `model.initial.initialise` sets them.

    Args:
        config: the shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, width] that turns hidden states into logits."""
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits [B, T, V] of int64 `tokens` [B, T], fp32 outside autocast."""
        return F.linear(self.model(tokens, cache), self.head_weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy, in nats per token, of predicting tokens 1…T from tokens 0…T−1.

        Args:
            tokens: int64 [B, T + 1].

        Returns:
            A scalar that can be differentiated.
        """
        hidden = self.model(tokens[:, :-1])
        return head_loss(hidden.flatten(0, 1), self.head_weight, tokens[:, 1:].reshape(-1))
