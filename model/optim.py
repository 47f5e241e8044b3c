"""The inner optimizer and its learning rate.

AdamW in fp32 (torch's fused kernel), with 8-bit states (bitsandbytes, 2 bytes per parameter instead of 8), or beside Muon. The
learning rate is warmup, stable, decay: a run without end stays at the plateau and can be stopped any time, a finite run ends with
a linear fall to a tenth. The rate is a pure function of the step, so a resumed or late peer needs no scheduler state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from model.errors import DataError
from model.muon import MuonWithAdamW

__all__ = ["InnerConfig", "build_optimizer", "learning_rate", "set_learning_rate", "state_bytes_per_parameter"]

_FINAL_SHARE = 0.1
_BYTES_ADAMW, _BYTES_ADAMW8BIT, _BYTES_MUON = 8.0, 2.03, 4.0


@dataclass(frozen=True, kw_only=True)
class InnerConfig:
    """Settings of local training; field by field the manifest's `inner` section, which documents them."""

    lr: float
    sequence_tokens: int
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.9
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    warmup_steps: int = 50
    min_sequences: int = 1
    max_sequences: int = 64


def build_optimizer(model: nn.Module, config: InnerConfig) -> torch.optim.Optimizer:
    """The optimizer over all parameters; weight decay acts on matrices and not on norms.

    Args:
        model: parameters must already be where they will stay (flattened, on their device).
        config: kind and constants.

    Raises:
        DataError: an unknown kind, or 8-bit states without bitsandbytes.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_layers = _layer_matrices(model)
    by_muon = {id(p) for p in in_layers} if config.optimizer == "muon" else set()
    groups = [
        {
            "params": [p for p in named.values() if p.ndim >= 2 and id(p) not in by_muon],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    if by_muon:
        return MuonWithAdamW(
            in_layers, groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, betas=betas
        )
    if config.optimizer in ("adamw", "muon"):
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    if config.optimizer != "adamw8bit":
        raise DataError(f"unknown optimizer {config.optimizer!r}; use adamw, adamw8bit or muon")
    try:
        from bitsandbytes.optim import AdamW8bit  # seconds to import, and only this setting needs it
    except ImportError:
        raise DataError("optimizer adamw8bit needs bitsandbytes; pip install bitsandbytes, or use adamw") from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=config.lr, betas=betas)
    return optimizer


def _layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and "layers." in name]


def state_bytes_per_parameter(model: nn.Module, optimizer: str) -> float:
    """Bytes of optimizer state per parameter, on the average; the model may be on the meta device."""
    if optimizer == "adamw8bit":
        return _BYTES_ADAMW8BIT
    total = sum(parameter.numel() for parameter in model.parameters())
    by_muon = sum(parameter.numel() for parameter in _layer_matrices(model)) if optimizer == "muon" else 0
    return (_BYTES_ADAMW * (total - by_muon) + _BYTES_MUON * by_muon) / total


def learning_rate(step: int, *, config: InnerConfig, total_steps: int = 0, decay_steps: int = 0) -> float:
    """Learning rate of one step: a linear rise, the plateau, a linear fall to a tenth.

    Args:
        step: from 0.
        config: gives the peak and `warmup_steps`.
        total_steps: length of the run; 0 for one without end, which never decays.
        decay_steps: the last steps, over which the rate falls.
    """
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if not total_steps or not decay_steps:
        return config.lr * rise
    left = min(1.0, max(0, total_steps - step) / decay_steps)
    return config.lr * rise * (_FINAL_SHARE + (1.0 - _FINAL_SHARE) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
