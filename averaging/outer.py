"""The outer optimizer: what a peer does with the mean progress of its group. Pure functions, in place, elementwise.

    Δ = θ − φ      mean_delta = token-weighted mean of Δ      pull = mean(φ) − φ_i      (pair-average: mean(θ) − θ_i)

    local          φ ← θ
    pair-average   φ ← θ + pull
    noloco         δ ← α·δ + β·mean_delta + γ·pull;  φ ← φ + δ                   (arXiv 2506.10911)
    diloco         δ ← α·δ + mean_delta;  φ ← φ + β·(mean_delta + α·δ) + γ·pull  (arXiv 2311.08105)

NoLoCo's Eq. 2 prints −β, which ascends with this Δ; its appendix Eq. 32 and its code use +β. It is heavy-ball momentum. With
the group = everyone, pull is zero and it is heavy-ball DiLoCo. DiLoCo itself is torch's Nesterov SGD on −Δ, lr β and momentum α.
The γ·pull of diloco is ours: with every message delivered φ is the same everywhere and the term is zero; over the
open internet messages get lost, and without a pull the replicas would stay apart for ever. γ = 0 turns it off and saves its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from protocol.manifest import gamma_bound

__all__ = ["Algorithm", "OuterConfig", "outer_step"]

Algorithm = Literal["local", "pair-average", "noloco", "diloco"]


@dataclass(frozen=True, kw_only=True)
class OuterConfig:
    """Constants of the outer optimizer.

    Args:
        algorithm: which rule.
        alpha: momentum α, 0 ≤ α < 1.
        beta: learning rate β on the mean Δ.
        gamma: consensus strength γ; 0 < γ < 2(1 − α²) for noloco, 0 ≤ γ < 2 for diloco; unused by the others.

    Raises:
        ValueError: a constant with which replicas would diverge.
    """

    algorithm: Algorithm = "noloco"
    alpha: float = 0.5
    beta: float = 0.7
    gamma: float = 0.7

    def __post_init__(self) -> None:
        if self.algorithm not in ("local", "pair-average", "noloco", "diloco"):
            raise ValueError(f"unknown algorithm {self.algorithm!r}")
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"alpha {self.alpha} is outside 0 ≤ α < 1")
        if self.algorithm == "noloco" and not 0.0 < self.gamma < gamma_bound(self.alpha):
            raise ValueError(f"gamma {self.gamma} is outside 0 < γ < 2(1 − α²) = {gamma_bound(self.alpha):.3f}")
        if self.algorithm == "diloco" and not 0.0 <= self.gamma < 2.0:
            raise ValueError(f"gamma {self.gamma} is outside 0 ≤ γ < 2")

    @property
    def has_momentum(self) -> bool:
        """Whether δ exists."""
        return self.algorithm in ("noloco", "diloco")

    @property
    def sends_delta(self) -> bool:
        """Whether Δ travels."""
        return self.has_momentum

    @property
    def sends_slow(self) -> bool:
        """Whether φ (pair-average: θ) travels."""
        return self.algorithm in ("pair-average", "noloco") or (self.algorithm == "diloco" and self.gamma > 0.0)


def outer_step(phi: Tensor, momentum: Tensor, mean_delta: Tensor, pull: Tensor | None, config: OuterConfig) -> None:
    """One outer step on a slice of the vectors.

    Args:
        phi: φ, fp32 [n], updated in place. For local and pair-average it must hold θ on entry.
        momentum: δ, fp32 [n], updated in place; left alone by local and pair-average.
        mean_delta: mean Δ of the group, fp32 [n]; used as working memory, its content is lost.
        pull: mean(φ) − φ_i, fp32 [n], or None for a solo step.
        config: the rule.
    """
    if config.algorithm == "noloco":
        momentum.mul_(config.alpha).add_(mean_delta, alpha=config.beta)
        if pull is not None:
            momentum.add_(pull, alpha=config.gamma)
        phi.add_(momentum)
    elif config.algorithm == "diloco":
        momentum.mul_(config.alpha).add_(mean_delta)
        phi.add_(mean_delta.add_(momentum, alpha=config.alpha), alpha=config.beta)
        if pull is not None:
            phi.add_(pull, alpha=config.gamma)
    elif config.algorithm == "pair-average" and pull is not None:
        phi.add_(pull)
