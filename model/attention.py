"""Grouped-query attention with rotary positions, and the key/value cache that generation uses.

The three projections stay separate matrices because their names and shapes are Hugging Face's. Rotation is
`x·cos + swap(x)·sin` with the halves' sign folded into the sine table, so that one multiply and one fused multiply-add do it;
attention itself is torch's fused kernel, which takes grouped heads without repeating keys and values.

Shapes: B sequences, T tokens, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig

__all__ = ["Attention", "KeyValueCache", "RotaryTables", "rotary_tables"]


@dataclass(frozen=True)
class RotaryTables:
    """Cosine and signed sine, each fp32 [T, 1, D], for consecutive positions."""

    cos: Tensor
    sin: Tensor


def rotary_tables(config: ModelConfig) -> RotaryTables:
    """Tables for every position up to `max_sequence_tokens`.

    The first half of the sine table is negated: `swap` exchanges the halves of a head, and the rotation of the pair (a, b) is
    (a·cos − b·sin, b·cos + a·sin).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inverse = 1.0 / (config.rope_theta**exponents)
    angles = torch.outer(torch.arange(config.max_sequence_tokens, dtype=torch.float32), inverse)[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    return RotaryTables(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


class KeyValueCache:
    """Rotated keys and values of the tokens a model has seen, preallocated for one generation.

    Args:
        config: the model's shape.
        num_sequences: B.
        max_tokens: room per sequence.
        device: where the model lives.
    """

    def __init__(
        self, config: ModelConfig, *, num_sequences: int, max_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.num_layers, 2, num_sequences, config.num_kv_heads, max_tokens, config.head_dim)
        self._room = torch.empty(shape, device=device)
        self.max_tokens = max_tokens
        self.num_tokens = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, K, T, D] of one layer; return all of them so far. `advance` moves on after the last layer."""
        end = self.num_tokens + keys.shape[2]
        assert end <= self.max_tokens, "the caller sizes the cache"
        room = self._room[layer]
        room[0, :, :, self.num_tokens : end] = keys
        room[1, :, :, self.num_tokens : end] = values
        return room[0, :, :, :end], room[1, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Count tokens as seen, once all layers have stored theirs."""
        self.num_tokens += num_tokens


class Attention(nn.Module):
    """Causal self-attention of one layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self._layer = layer
        self._head_dim = config.head_dim
        width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, tables: RotaryTables, cache: KeyValueCache | None) -> Tensor:
        """Attend. `hidden` [B, T, width]; the tables cover exactly these T positions."""
        batch, tokens, _ = hidden.shape
        split = (batch, tokens, -1, self._head_dim)
        queries = _rotate(self.q_proj(hidden).view(split), tables).transpose(1, 2)
        keys = _rotate(self.k_proj(hidden).view(split), tables).transpose(1, 2)
        values = self.v_proj(hidden).view(split).transpose(1, 2)
        past = 0
        if cache is not None:
            past = cache.num_tokens
            keys, values = cache.extend(self._layer, keys, values)
        mask = None
        if past and tokens > 1:  # new tokens see all of the past and, among themselves, only what precedes them
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=hidden.device).tril(past)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=past == 0 and tokens > 1, enable_gqa=True
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out


def _rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Rotate pairs of x [B, T, heads, D] by their position's angles."""
    cos, sin = tables.cos.to(x.dtype), tables.sin.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
