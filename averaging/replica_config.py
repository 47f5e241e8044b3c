"""The settings of a replica: what travels, in which format, and how a partner's share enters."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

from averaging.admission import AdmissionConfig
from averaging.codec import DELTA_CODECS, SLOW_CODECS, codec_named
from averaging.fragments import Choice, Fragments
from averaging.outer import OuterConfig
from protocol.sync_spec import SyncSpec

__all__ = ["ReplicaConfig"]


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """How one run averages.

    Args:
        outer: the outer optimizer.
        admission: bounds on partners; None trusts every finite update (closed swarms, simulations).
        delta_codec: format of Δ.
        slow_codec: format of φ (pair-average and theta_only: of θ).
        error_decay: factor b in (0, 1] on the error feedback: e ← b·e + Δ − sent.
        fragments: number of fragments F, of which each round exchanges one.
        fragment_choice: whether they take turns, or are drawn at random for each round.
        blend: a in [0, 1), with F > 1: θ ← a·θ + (1 − a)·outer step.
        lag_decay: factor in (0, 1] on a partner's Δ and φ, per round between its and ours.
        compiled: whether the passes run as compiled code (C on a CPU, else torch.compile): True, False, or None for "when the
            model is large", since compiling takes longer than many rounds' worth of eager work on a small one.

    Raises:
        ValueError: a codec that does not fit, or a number out of its range.
    """

    outer: OuterConfig = field(default_factory=OuterConfig)
    admission: AdmissionConfig | None = field(default_factory=AdmissionConfig)
    delta_codec: str = "q8"
    slow_codec: str = "bf16"
    error_decay: float = 1.0
    fragments: int = 1
    fragment_choice: Choice = "turn"
    blend: float = 0.0
    lag_decay: float = 0.5
    compiled: bool | None = False

    def __post_init__(self) -> None:
        if self.delta_codec not in DELTA_CODECS:
            raise ValueError(f"delta_codec {self.delta_codec!r} is none of {', '.join(DELTA_CODECS)}")
        if self.slow_codec not in SLOW_CODECS:
            raise ValueError(f"slow_codec {self.slow_codec!r} is none of {', '.join(SLOW_CODECS)}")
        for name in ("error_decay", "lag_decay"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} {getattr(self, name)} is outside 0 < {name} ≤ 1")
        if self.fragments < 1:
            raise ValueError(f"fragments {self.fragments} is below 1")
        if self.fragment_choice == "random" and (self.fragments == 1 or self.outer.sends_delta):
            raise ValueError("random fragments need fragments > 1 and a rule that sends θ alone")
        if not 0.0 <= self.blend < 1.0 or (self.blend > 0.0 and self.fragments == 1):
            raise ValueError(f"blend {self.blend} is outside 0 ≤ blend < 1, or there is only one fragment")

    @classmethod
    def of(cls, sync: SyncSpec, *, admission: AdmissionConfig | None, compiled: bool | None = False) -> Self:
        """What a run's [sync] section says; `admission` and `compiled` as in the constructor."""
        outer = OuterConfig(**{each.name: getattr(sync, each.name) for each in fields(OuterConfig)})
        own = ("delta_codec", "slow_codec", "error_decay", "fragments", "fragment_choice", "blend", "lag_decay")
        return cls(outer=outer, admission=admission, compiled=compiled, **{name: getattr(sync, name) for name in own})

    def payload_bytes(self, num_parameters: int, round: int = 0) -> tuple[int, int]:
        """Exact bytes of (Δ, φ) on the wire in one round, for a model of that size."""
        fragments = self.division(num_parameters)
        return self._bytes(fragments.numel(fragments.index(round)))

    def max_payload_bytes(self, num_parameters: int) -> tuple[int, int]:
        """The same in the round of the longest fragment."""
        return self._bytes(self.division(num_parameters).max_numel)

    def division(self, num_parameters: int) -> Fragments:
        """A model of that size in fragments.

        Raises:
            ValueError: it has too few parameters for them.
        """
        return Fragments(num_parameters, self.fragments, choice=self.fragment_choice)

    def _bytes(self, numel: int) -> tuple[int, int]:
        delta = codec_named(self.delta_codec).num_bytes(numel) if self.outer.sends_delta else 0
        slow = codec_named(self.slow_codec).num_bytes(numel) if self.outer.sends_slow else 0
        return delta, slow
