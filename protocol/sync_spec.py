"""The manifest's [sync] section: how peers average. What the settings do is in averaging/outer.py and averaging/replica.py.

One code path runs all algorithms; they differ in these settings only. Some defaults depend on the algorithm (`_DEFAULTS`), so
they are filled in before validation and stand in the canonical form like everything else: a later version with other
defaults still sees a run as it was meant. The defaults are those that learnt best for their bytes
(docs/benchmarks.md), but for fragments, which ask peers to be in step.
Combinations under which replicas would drift apart are errors here, before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from protocol.manifest_section import Section

__all__ = ["FRAGMENT_BLOCK", "SyncSpec", "gamma_bound"]

FRAGMENT_BLOCK = 4096
"""Elements; every codec's block divides it, and every fragment of a model holds at least one such block, whole or cut short."""

_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "local": {"group": "none"},
    # bf16: replicas of a group are equal, and the lattice's steps, each peer's own, would move them apart.
    "diloco": {"group": "all", "momentum": "nesterov", "alpha": 0.9, "slow_codec": "bf16"},
    "sparseloco": {
        "group": "all",
        "alpha": 0.0,
        "beta": 1.0,
        "gamma": 0.0,
        "delta_codec": "topk",
        "slow_codec": "bf16",
        "error_decay": 0.95,
    },
}
_HEAVY_BALL_DILOCO_ALPHA = 0.3


def gamma_bound(alpha: float) -> float:
    """Upper bound of γ for mean-square consensus under independent random pairs: 2(1 − α²).

    The NoLoCo paper's Eq. 74 states another bound, under which replicas diverge (measured at α = 0.9, γ = 0.7).
    """
    return 2.0 * (1.0 - alpha * alpha)


class SyncSpec(Section):
    """How peers average (shared mathematics in averaging/outer.py)."""

    algorithm: Literal["local", "pair-average", "noloco", "diloco", "sparseloco"] = "noloco"
    """local: never; pair-average: mean of two peers' weights; noloco: gossip with momentum; diloco: outer momentum on the mean
    progress; sparseloco: only the largest changes travel, the rest waits in the error feedback."""
    group: Literal["none", "pair", "all"] = "pair"
    """Who averages in a round: two peers, or all. Left out: all for diloco and sparseloco, none for local, else pair."""
    inner_steps: int = Field(default=35, ge=1, le=10_000)
    """Inner steps per round, after which it has one exchange; a peer that is ahead of the others takes more of them."""
    total_rounds: int = Field(default=0, ge=0, le=1_000_000_000)
    """Rounds after which the run ends; 0 for a run without end."""
    decay_rounds: int = Field(default=0, ge=0, le=1_000_000_000)
    """The last rounds of a finite run, over which the learning rate falls linearly to a tenth."""
    round_target_s: float = Field(default=60.0, ge=1.0, le=86_400.0)
    """Seconds a round should last; each peer picks its sequences per step accordingly."""
    momentum: Literal["heavy-ball", "nesterov"] = "heavy-ball"
    """Kind of outer momentum. Left out: nesterov for diloco; noloco has heavy-ball only, the others have none."""
    alpha: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Outer momentum α. Left out: 0.9 for diloco with nesterov, 0.3 with heavy-ball, 0 for sparseloco."""
    beta: float = Field(default=0.7, gt=0.0, le=2.0)
    """Outer learning rate β on the mean Δ. Left out: 1 for sparseloco."""
    gamma: float = Field(default=0.7, ge=0.0)
    """Consensus strength γ on the difference of slow weights; 0 < γ < 2(1 − α²) for noloco. Left out: 0 for sparseloco."""
    theta_only: bool = False
    """noloco with γ = β: only θ travels, which is half the values; tokens no longer weigh progress. Left out: true where γ = β
    and no delta_codec is asked for."""
    staleness_penalty: float = Field(default=1.0, gt=0.0, le=1.0)
    """Factor on an outer step that was taken under the next round's inner steps; 1 turns it off."""
    momentum_clip: float = Field(default=0.0, ge=0.0, le=1000.0)
    """Longest outer step, in norms of the peer's own Δ; momentum is scaled down with it; 0 turns it off."""
    overlap: bool = True
    """Whether an exchange runs under the next round's inner steps instead of stopping them."""
    fragments: int = Field(default=1, ge=1, le=64)
    """Parts of the model that are exchanged in turn, one per round; divides total_rounds, and needs max_lag_rounds = 0."""
    fragment_choice: Literal["turn", "random"] = "turn"
    """turn: fragments one after another; random: a share 1/fragments of the model, drawn anew for each round (sparse continuous
    averaging, with few inner_steps). random is for pair-average and noloco's theta_only in pairs."""
    blend: float = Field(default=0.0, ge=0.0, lt=1.0)
    """With fragments: share a of the local weights in θ ← a·θ + (1 − a)·outer step."""
    delta_codec: Literal["fp32", "bf16", "q8", "q4", "e3m0", "topk"] = "q8"
    """Format of Δ on the wire; lossy ones carry error feedback. Left out: topk for sparseloco."""
    error_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Factor on the error feedback per exchange; 1 forgets nothing. Left out: 0.95 for sparseloco."""
    slow_codec: Literal["fp32", "bf16", "q8", "q4", "lattice"] = "lattice"
    """Format of φ on the wire (of θ for pair-average and theta_only); lattice sends 4 bits and needs replicas that are near."""
    early_slow: bool = False
    """Whether φ is sent to the expected partner ahead of the exchange, under the inner steps, so that only Δ is left to send; for
    pairs that exchange φ apart from Δ, in another format than lattice. With it theta_only is false and slow_codec bf16 if left
    out."""
    exchange_timeout_s: float = Field(default=60.0, ge=1.0, le=3600.0)
    """Deadline of one exchange, from the first proposal to the commit; afterwards the peer steps alone."""
    max_lag_rounds: int = Field(default=1, ge=0, le=8)
    """Largest difference of round numbers between two partners. Left out: 0 with fragments."""
    lag_decay: float = Field(default=0.5, gt=0.0, le=1.0)
    """Factor on what a partner contributes, per round that it is away from ours."""
    consolidation_tolerance: float = Field(default=1e-3, ge=0.0, lt=1.0)
    """After the last round of a finite run the peers average until their weights differ by less than this, relative; 0: never."""
    snapshot_rounds: int = Field(default=4, ge=1, le=1000)
    """Every so many rounds one peer, chosen by lot, publishes its state for joiners, and a few others keep copies."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_algorithm_s_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        algorithm, fragments = data.get("algorithm"), data.get("fragments")
        defaults = dict(_DEFAULTS.get(algorithm, {})) if isinstance(algorithm, str) else {}
        if algorithm == "diloco" and data.get("momentum") == "heavy-ball":
            defaults["alpha"] = _HEAVY_BALL_DILOCO_ALPHA
        if isinstance(fragments, int) and fragments > 1:
            defaults["max_lag_rounds"] = 0
        if data.get("algorithm", "noloco") == "noloco":
            beta, gamma = (data.get(name, cls.model_fields[name].default) for name in ("beta", "gamma"))
            defaults["theta_only"] = beta == gamma and "delta_codec" not in data and data.get("early_slow") is not True
        if data.get("early_slow") is True:
            defaults["slow_codec"] = "bf16"
        return defaults | data

    @model_validator(mode="after")
    def _gamma_converges(self) -> Self:
        bound = gamma_bound(self.alpha)
        if self.algorithm == "noloco" and not 0.0 < self.gamma < bound:
            raise ValueError(
                f"sync.gamma {self.gamma} is outside 0 < γ < 2(1 − α²) = {bound:.3f}: replicas would drift apart; "
                "lower gamma or alpha"
            )
        if self.algorithm in ("diloco", "sparseloco"):
            if not self.gamma < 2.0:
                raise ValueError(f"sync.gamma {self.gamma} must be below 2 for {self.algorithm}; lower gamma")
            if self.group == "pair" and self.gamma == 0.0:
                raise ValueError(f"{self.algorithm} in pairs needs sync.gamma > 0, or replicas would drift apart")
            if self.group == "all" and self.gamma > 0.0 and self.slow_codec == "lattice":
                raise ValueError(
                    f"sync.slow_codec lattice would move the equal replicas of {self.algorithm} in groups apart; take bf16"
                )
        return self

    @model_validator(mode="after")
    def _rule_is_complete(self) -> Self:
        if (self.group == "none") != (self.algorithm == "local"):
            raise ValueError("sync.group none belongs to algorithm local and to no other; leave group out")
        if self.momentum == "nesterov" and self.algorithm != "diloco":
            raise ValueError(f"sync.momentum nesterov is diloco's; {self.algorithm} needs heavy-ball, or leave it out")
        if self.algorithm == "sparseloco" and self.alpha != 0.0:
            raise ValueError("sync.alpha must be 0 for sparseloco, which has no outer momentum; leave it out")
        if self.momentum_clip > 0.0 and self.algorithm not in ("noloco", "diloco"):
            raise ValueError(f"sync.momentum_clip must be 0 for {self.algorithm}, which has no outer momentum")
        if self.theta_only and self.algorithm != "noloco":
            raise ValueError("sync.theta_only is a form of noloco; choose that algorithm, or leave it out")
        if self.theta_only and self.gamma != self.beta:
            raise ValueError(
                f"sync.theta_only needs gamma = beta; set sync.gamma to {self.beta}, or theta_only to false"
            )
        return self

    @model_validator(mode="after")
    def _slow_can_go_ahead(self) -> Self:
        if not self.early_slow:
            return self
        if self.group != "pair" or self.algorithm == "pair-average" or self.theta_only:
            raise ValueError(
                "sync.early_slow needs pairs that exchange φ apart from Δ: noloco with theta_only = false, or diloco or sparseloco "
                "with group pair; set it to false"
            )
        if self.slow_codec == "lattice":
            raise ValueError(
                "sync.early_slow needs another sync.slow_codec than lattice, which depends on Δ; take bf16"
            )
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> Self:
        if self.decay_rounds > self.total_rounds:
            raise ValueError("sync.decay_rounds must not exceed sync.total_rounds")
        if self.fragments == 1:
            if self.blend > 0.0:
                raise ValueError("sync.blend needs sync.fragments > 1; set blend to 0")
            if self.fragment_choice == "random":
                raise ValueError("sync.fragment_choice random needs sync.fragments > 1: a share 1/fragments is drawn")
            return self
        if self.algorithm == "local":
            raise ValueError("sync.fragments must be 1 for local, which exchanges nothing")
        if self.max_lag_rounds > 0:
            raise ValueError("sync.max_lag_rounds must be 0 with fragments, since each round has another one")
        if self.fragment_choice == "random":
            if self.group != "pair" or not (self.algorithm == "pair-average" or self.theta_only):
                raise ValueError(
                    "sync.fragment_choice random needs pair-average, or noloco with theta_only, in pairs; set it to turn"
                )
        elif self.total_rounds % self.fragments:
            raise ValueError(
                f"sync.total_rounds {self.total_rounds} must be a multiple of sync.fragments {self.fragments}"
            )
        return self
