"""The toy problem that simulated peers train on: cheap enough for thousands of peers, and solvable by hand.

Peer i minimises ½‖θ − c_i‖² with noisy gradients. Its optimum c_i = c + h·ζ_i lies around the common one, as its data differ
from the others'; every coordinate of c and ζ_i is standard normal. One inner step is

    θ ← θ − η·(θ − c_i + ν·ξ),        ξ ~ N(0, I)

so θ − c_i is an autoregressive process, and m steps are one draw with exactly the same distribution:

    θ_m = c_i + a·(θ_0 − c_i) + ν·η·√((1 − a²) / (1 − (1 − η)²))·ξ,        a = (1 − η)^m

The loss is ½·mean((θ − c)²). Without averaging a peer ends near ½h²; the mean of all replicas ends near zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["Quadratic", "QuadraticConfig", "loss_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuadraticConfig:
    """Constants of the problem.

    Args:
        num_parameters: length of θ.
        lr: η.
        noise: ν.
        data_spread: h.
        seed: of c, the ζ_i and all noise.
    """

    num_parameters: int
    lr: float
    noise: float
    data_spread: float
    seed: int


class Quadratic:
    """One peer's problem.

    Args:
        config: the problem.
        number: the peer's.
    """

    def __init__(self, config: QuadraticConfig, number: int) -> None:
        self._config = config
        self.num_parameters = config.num_parameters
        self._random = np.random.default_rng((config.seed, 1, number))
        offset = self._draw()
        self._optimum = common_optimum(config) + config.data_spread * offset

    def train(self, theta: Tensor, steps: int) -> None:
        """Take `steps` inner steps on θ, fp32 [P], in place."""
        keep = 1.0 - self._config.lr
        decay = keep**steps
        scale = self._config.noise * self._config.lr * math.sqrt((1.0 - decay * decay) / (1.0 - keep * keep))
        theta.mul_(decay).add_(self._optimum, alpha=1.0 - decay).add_(self._draw(), alpha=scale)

    def _draw(self) -> Tensor:
        return torch.from_numpy(self._random.standard_normal(self._config.num_parameters, dtype=np.float32))


@lru_cache(maxsize=128)
def common_optimum(config: QuadraticConfig) -> Tensor:
    """c, fp32 [P]; not to be written to."""
    draw = np.random.default_rng((config.seed, 0)).standard_normal(config.num_parameters, dtype=np.float32)
    return torch.from_numpy(draw)


def loss_of(theta: Tensor, config: QuadraticConfig) -> float:
    """½·mean((θ − c)²) of a θ [P]."""
    return 0.5 * float((theta - common_optimum(config)).square().mean())
