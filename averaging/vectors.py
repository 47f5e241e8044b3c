"""The vectors of one replica's averaging state, and the passes over them that an exchange is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from averaging.partners import Measurement, Partner

__all__ = ["Passes", "Vectors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """All that is as long as the model: fp32 [P] each, or empty where the run has no use for it.

    Args:
        theta: θ, the model's own weights.
        phi: φ, the slow weights; with pair averaging θ after the last step, where the fast routes may keep packed θ meanwhile.
        momentum: δ.
        residual: what the Δ codec lost so far.
        anchor: θ as it was packed; with pair averaging it may be φ itself, or the payload (averaging/native_passes.py).
    """

    theta: Tensor
    phi: Tensor
    momentum: Tensor
    residual: Tensor
    anchor: Tensor


class Passes(ABC):
    """What is computed over whole vectors; each method visits the round's fragment once or a few times."""

    @abstractmethod
    def pack(self, round: int) -> float:
        """anchor ← θ; encode Δ and the slow payload. Returns ‖Δ‖, not finite if θ is not."""

    @abstractmethod
    def measure(self, round: int, partners: Sequence[Partner]) -> list[Measurement]:
        """How far every partner is from us."""

    @abstractmethod
    def step(
        self, round: int, accepted: Sequence[Partner], *, scale: float, clip: float, keeps_residual: bool
    ) -> float:
        """Take the outer step and correct θ by it.

        Args:
            round: of our own update.
            accepted: with their factors; none for the solo step.
            scale: factor on φ's step.
            clip: factor on δ.
            keeps_residual: whether somebody received our Δ, so that only what the codec lost stays with us.

        Returns:
            ‖φ_new − anchor‖.
        """

    @abstractmethod
    def step_norm(self, round: int, accepted: Sequence[Partner]) -> float:
        """‖outer step‖ as it would be, for the momentum clip."""
