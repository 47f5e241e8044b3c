"""One stage of a model that is split over several peers: some consecutive layers, and for stage 0 everything around them.

    stage 0      embedding, its layers;  final norm, head and loss of what comes back
    stage s      its layers on what the stage before sent

A layer adds to the residual stream, so a stage that a microbatch skips is the identity, and stages may even change places.
Parameter names are those of the whole model (model/transformer.py): the state dicts of all stages together are the whole
model's, and initial weights and checkpoints need no translation.

Shapes: B sequences, T tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.attention import RotaryTables, rotary_tables
from model.config import ModelConfig
from model.errors import DataError
from model.head_loss import head_loss
from model.transformer import DecoderLayer, RMSNorm

__all__ = ["Stage", "run_path", "stage_layers"]


def stage_layers(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """The layers of every stage: as even as can be, stage 0 never more than another, since it has embedding and head besides.

    Raises:
        DataError: there are fewer layers than stages.
    """
    if not 1 <= num_stages <= num_layers:
        raise DataError(f"{num_layers} layers can not make {num_stages} stages; choose between 1 and {num_layers}")
    ends = [num_layers * (stage + 1) // num_stages for stage in range(num_stages)]
    return tuple(range(start, end) for start, end in zip((0, *ends), ends, strict=False))


class _Part(nn.Module):
    """What of `Transformer.model` one stage holds, under the same names."""

    def __init__(self, config: ModelConfig, layers: range, *, has_ends: bool) -> None:
        super().__init__()
        if has_ends:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(layer): DecoderLayer(config, layer) for layer in layers})
        if has_ends:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Stage(nn.Module):
    """Stage `number` of `num_stages`. Weights are torch's defaults until `model.initial.initialise` sets them.

    Args:
        config: shape of the whole model.
        number: which stage.
        num_stages: how many there are.

    Raises:
        DataError: the model has fewer layers than that.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, number: int, num_stages: int) -> None:
        super().__init__()
        self.config, self.number = config, number
        self.model = _Part(config, stage_layers(config.num_layers, num_stages)[number], has_ends=number == 0)
        if number == 0 and not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        tables = rotary_tables(config)
        self.register_buffer("cos", tables.cos, persistent=False)
        self.register_buffer("sin", tables.sin, persistent=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, T, W] of int64 `tokens` [B, T]. Stage 0 only."""
        hidden: Tensor = self.model.embed_tokens(tokens)
        return hidden

    def forward(self, hidden: Tensor) -> Tensor:
        """Send hidden states [B, T, W] through this stage's layers."""
        num_tokens = hidden.shape[1]
        tables = RotaryTables(self.cos[:num_tokens], self.sin[:num_tokens])
        for layer in self.model.layers.values():
            hidden = layer(hidden, tables, None)
        return hidden

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per token. Stage 0 only.

        Args:
            hidden: [B, T, W], what the last stage of the path gave.
            targets: int64 [B, T].
        """
        weight = self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight
        return head_loss(self.model.norm(hidden).flatten(0, 1), weight, targets.reshape(-1))


def run_path(stages: Sequence[Stage], tokens: Tensor) -> Tensor:
    """Loss of one microbatch through these stages in this order, all in one process.

    Args:
        stages: the path; the first is stage 0.
        tokens: int64 [B, T + 1].
    """
    hidden = stages[0].embed(tokens[:, :-1])
    for stage in stages:
        hidden = stage(hidden)
    loss: Tensor = stages[0].loss(hidden, tokens[:, 1:])
    return loss
