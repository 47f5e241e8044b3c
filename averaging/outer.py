"""The outer optimizer: what a peer does with the mean progress of its group. Pure functions, in place, elementwise.

    Δ = θ − φ      mean_delta = token-weighted mean of Δ      pull = mean(φ) − φ_i

    local                 φ ← θ
    pair-average          φ ← θ + pull                     pull = mean(θ) − θ_i
    noloco                δ ← α·δ + β·mean_delta + γ·pull;  φ ← φ + δ                          (arXiv 2506.10911)
    noloco, θ only        the same with mean_delta = Δ_i, pull = mean(θ) − θ_i and γ = β: δ ← α·δ + β·(mean(θ) − φ_i)
    diloco, nesterov      δ ← α·δ + mean_delta;  φ ← φ + β·(mean_delta + α·δ) + γ·pull         (arXiv 2311.08105)
    diloco, heavy-ball    δ ← α·δ + mean_delta;  φ ← φ + β·δ + γ·pull
    sparseloco            φ ← φ + β·mean_delta + γ·pull, Δ sparse with error feedback          (arXiv 2508.15706)

NoLoCo's Eq. 2 prints −β, which ascends with this Δ; its appendix Eq. 32 and its code use +β. It is heavy-ball momentum. With
the group = everyone, pull is zero and it is heavy-ball DiLoCo. DiLoCo itself is torch's SGD on −Δ, lr β and momentum α.
The γ·pull of diloco and sparseloco is ours: with every message delivered φ is the same everywhere and the term is zero; over the
open internet messages get lost, and without a pull the replicas would stay apart for ever. γ = 0 turns it off and saves its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from protocol.manifest import gamma_bound

__all__ = ["Algorithm", "Momentum", "OuterConfig", "outer_step"]

Algorithm = Literal["local", "pair-average", "noloco", "diloco", "sparseloco"]
Momentum = Literal["heavy-ball", "nesterov"]


@dataclass(frozen=True, kw_only=True)
class OuterConfig:
    """Constants of the outer optimizer.

    Args:
        algorithm: which rule.
        momentum: kind of momentum; None for the algorithm's own: nesterov for diloco, else heavy-ball.
        alpha: momentum α, 0 ≤ α < 1.
        beta: learning rate β on the mean Δ.
        gamma: consensus strength γ; 0 < γ < 2(1 − α²) for noloco, 0 ≤ γ < 2 for diloco and sparseloco; unused by the others.
        theta_only: noloco with γ = β, which needs θ from a partner and nothing else.
        staleness_penalty: factor in (0, 1] on a step that was delayed, see `Replica.apply`.
        momentum_clip: c ≥ 0; a step longer than c·‖Δi‖ is shortened to that, and δ with it; 0 for no limit.

    Raises:
        ValueError: a constant with which replicas would diverge, or which the algorithm does not have.
    """

    algorithm: Algorithm = "noloco"
    momentum: Momentum | None = None
    alpha: float = 0.5
    beta: float = 0.7
    gamma: float = 0.7
    theta_only: bool = False
    staleness_penalty: float = 1.0
    momentum_clip: float = 0.0

    def __post_init__(self) -> None:
        if self.algorithm not in ("local", "pair-average", "noloco", "diloco", "sparseloco"):
            raise ValueError(f"unknown algorithm {self.algorithm!r}")
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"alpha {self.alpha} is outside 0 ≤ α < 1")
        if self.algorithm == "noloco" and not 0.0 < self.gamma < gamma_bound(self.alpha):
            raise ValueError(f"gamma {self.gamma} is outside 0 < γ < 2(1 − α²) = {gamma_bound(self.alpha):.3f}")
        if self.algorithm in ("diloco", "sparseloco") and not 0.0 <= self.gamma < 2.0:
            raise ValueError(f"gamma {self.gamma} is outside 0 ≤ γ < 2")
        if self.momentum == "nesterov" and self.algorithm != "diloco":
            raise ValueError(f"nesterov momentum is diloco's, not that of {self.algorithm}")
        if self.theta_only and (self.algorithm != "noloco" or self.gamma != self.beta):
            raise ValueError("theta_only is noloco with gamma = beta")
        if not 0.0 < self.staleness_penalty <= 1.0:
            raise ValueError(f"staleness_penalty {self.staleness_penalty} is outside 0 < penalty ≤ 1")
        if self.momentum_clip < 0.0 or (self.momentum_clip > 0.0 and not self.has_momentum):
            raise ValueError(f"momentum_clip {self.momentum_clip} needs a momentum and must not be negative")

    @property
    def keeps_slow(self) -> bool:
        """Whether φ is more than the last θ: it moves by the mean Δ, and θ returns to it after every round."""
        return self.algorithm in ("noloco", "diloco", "sparseloco")

    @property
    def has_momentum(self) -> bool:
        """Whether δ exists."""
        return self.algorithm in ("noloco", "diloco")

    @property
    def sends_delta(self) -> bool:
        """Whether Δ travels."""
        return self.keeps_slow and not self.theta_only

    @property
    def sends_slow(self) -> bool:
        """Whether φ or θ travels."""
        return self.algorithm in ("pair-average", "noloco") or (self.keeps_slow and self.gamma > 0.0)

    @property
    def slow_is_theta(self) -> bool:
        """Whether what travels as the slow payload is θ instead of φ."""
        return self.algorithm == "pair-average" or self.theta_only


def outer_step(phi: Tensor, momentum: Tensor, mean_delta: Tensor, pull: Tensor | None, config: OuterConfig) -> None:
    """One outer step on a slice of the vectors.

    Args:
        phi: φ, fp32 [n], updated in place. For local and pair-average it must hold θ on entry. Zeros give the step itself.
        momentum: δ, fp32 [n], updated in place; left alone where there is none.
        mean_delta: mean Δ of the group, fp32 [n]; used as working memory, its content is lost.
        pull: mean(φ) − φ_i, fp32 [n], or None for a solo step.
        config: the rule.
    """
    if config.algorithm == "noloco":
        momentum.mul_(config.alpha).add_(mean_delta, alpha=config.beta)
        if pull is not None:
            momentum.add_(pull, alpha=config.gamma)
        phi.add_(momentum)
        return
    if config.algorithm == "diloco":
        momentum.mul_(config.alpha).add_(mean_delta)
        heavy_ball = config.momentum == "heavy-ball"
        phi.add_(momentum if heavy_ball else mean_delta.add_(momentum, alpha=config.alpha), alpha=config.beta)
    elif config.algorithm == "sparseloco":
        phi.add_(mean_delta, alpha=config.beta)
    if pull is not None:
        phi.add_(pull, alpha=1.0 if config.algorithm == "pair-average" else config.gamma)
