"""Partners that average AdamW's moments as well as the weights: an attempt of the convergence benchmark.

Both moments are sent in 8 bits. The second goes as its fourth root: rounded to zero, it would make a step endless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from averaging.codec import codec_named
from averaging.flatten import FlatParameters
from averaging.fragments import Piece

__all__ = ["Trained", "moment_bytes", "share_moments"]

_ROOTS = {"exp_avg": 1, "exp_avg_sq": 4}
_CODEC = codec_named("q8")


class Trained(Protocol):
    """What is trained, and by what."""

    @property
    def model(self) -> nn.Module:
        """The model."""

    @property
    def flat(self) -> FlatParameters:
        """Its vector."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over its parameters."""


def moment_bytes(pieces: Sequence[Piece]) -> int:
    """What one peer sends of both moments."""
    return len(_ROOTS) * sum(_CODEC.num_bytes(piece.span.stop - piece.span.start) for piece in pieces)


def share_moments(group: Sequence[Trained], pieces: Sequence[Piece]) -> None:
    """Give everybody the group's mean of both moments in these parts of the vector."""
    for name, root in _ROOTS.items():
        flats = [_gathered(member, name) for member in group]
        for piece in pieces:
            mean = torch.stack([_as_sent(flat[piece.span], root) for flat in flats]).mean(0)
            for flat in flats:
                flat[piece.span] = mean
        for member, flat in zip(group, flats, strict=True):
            _put(member, name, flat)


def _as_sent(values: Tensor, root: int) -> Tensor:
    sent = values.pow(1 / root)
    payload = torch.zeros(_CODEC.num_bytes(sent.numel()), dtype=torch.uint8)
    _CODEC.encode(sent, payload)
    _CODEC.decode(payload, sent)
    return sent.pow(root)


def _gathered(member: Trained, name: str) -> Tensor:
    """One moment of all parameters, laid out like θ."""
    return torch.cat([member.optimizer.state[parameter][name].reshape(-1) for parameter in member.model.parameters()])


def _put(member: Trained, name: str, flat: Tensor) -> None:
    for parameter, view in zip(member.model.parameters(), member.flat.views(flat).values(), strict=True):
        member.optimizer.state[parameter][name].copy_(view)
