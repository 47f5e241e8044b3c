"""Whether, and how strongly, a stranger's update may move us: SECURITY.md, Byzantine peers, steps 1–3.

With a single partner there is no majority to ask, so robustness comes from our own history. For a partner j

    d = ‖Δj − Δi‖    e = ‖φj − φi‖
    τ = median of the last accepted distances, held between ‖Δi‖ and clip_factor·‖Δi‖       (one τ for d, one for e)
    refused beyond reject_factor·τ or when not finite; otherwise the difference is scaled to at most τ

and its weight starts small and rises over its first accepted exchanges. A partner's claim of tokens counts only up to a multiple
of our own, so the weight is never its to choose. The lower end of τ is also the cold start: all peers begin with one φ, so the
first accepted e is 0, and a median alone would refuse everybody from then on.

A partner refused for e alone may be right, and we the odd one out: after a long network partition both halves would refuse each
other for ever (measured: 16 peers, 150 rounds apart, 99 % of meetings refused). So when a third of the recent partners were
that far away, they are clipped instead. That gives an attacker no more than staying at the threshold does.

Norms bound what one exchange can do; they do not tell good from bad (an attacker can stay at the threshold). The validation gate
that does is a separate step.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from protocol.ids import PeerId

__all__ = ["Admission", "AdmissionConfig", "Distances", "Verdict", "token_shares"]

_MAX_REMEMBERED_PEERS = 4096  # forgetting the longest unseen peer costs it its ramp, nothing else
_ODD_ONE_OUT_SHARE = 1 / 3  # of the last `history` partners; fewer attackers than that can not switch the rule on


@dataclass(frozen=True, kw_only=True)
class AdmissionConfig:
    """Bounds on what a partner can do; field names as in the manifest's [safety].

    Args:
        history: accepted distances whose median bounds the next one.
        clip_factor: upper end of τ, in norms of our own Δ.
        reject_factor: a distance beyond this many τ is refused.
        newcomer_weight: weight of a partner never accepted before.
        newcomer_exchanges: accepted exchanges until a partner's weight is 1.
        max_token_ratio: a partner's claimed tokens count up to this multiple of ours.
    """

    history: int = 16
    clip_factor: float = 3.0
    reject_factor: float = 3.0
    newcomer_weight: float = 0.25
    newcomer_exchanges: int = 10
    max_token_ratio: float = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """How far a partner's update is from ours; L2 norms over all parameters.

    Args:
        delta: d = ‖Δj − Δi‖, 0 where Δ does not travel.
        slow: e = ‖φj − φi‖, 0 where φ does not travel.
        own: ‖Δi‖, finite.
    """

    delta: float
    slow: float
    own: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What to do with a partner's update.

    Args:
        kind: averaged (as it is), clipped (scaled down) or refused.
        weight: newcomer weight in (0, 1]; 0 when refused.
        delta_scale: factor on Δj − Δi.
        slow_scale: factor on φj − φi.
        distances: what was measured; None when the bytes could not be read.
        reason: why it was refused, else empty.
    """

    kind: Literal["averaged", "clipped", "refused"]
    weight: float = 1.0
    delta_scale: float = 1.0
    slow_scale: float = 1.0
    distances: Distances | None = None
    reason: str = ""

    @classmethod
    def refused(cls, reason: str, distances: Distances | None = None) -> Verdict:
        """A refusal."""
        return cls(kind="refused", weight=0.0, delta_scale=0.0, slow_scale=0.0, distances=distances, reason=reason)


class Admission:
    """The history of accepted distances and partners of one peer.

    Args:
        config: bounds; None trusts every finite update fully (closed swarms, simulations).
    """

    def __init__(self, config: AdmissionConfig | None) -> None:
        self._config = config
        length = config.history if config else 1
        self._delta: deque[float] = deque(maxlen=length)
        self._slow: deque[float] = deque(maxlen=length)
        self._far: deque[bool] = deque(maxlen=length)  # of recent partners with a plausible Δ: was φ beyond the limit?
        self._accepted: dict[PeerId, int] = {}
        self.refusals_in_a_row = 0
        """Refused updates since the last accepted one. Many mean that WE are the odd one out: fetch the swarm's state."""

    def judge(self, peer: PeerId, distances: Distances) -> Verdict:
        """Decide about one update, and remember it when it is accepted."""
        verdict = self._decide(peer, distances)
        if verdict.kind == "refused":
            self.refusals_in_a_row += 1
            return verdict
        self.refusals_in_a_row = 0
        self._delta.append(distances.delta)
        self._slow.append(distances.slow)
        self._accepted[peer] = self._accepted.pop(peer, 0) + 1  # moves the peer to the end: most recently seen
        if len(self._accepted) > _MAX_REMEMBERED_PEERS:
            del self._accepted[next(iter(self._accepted))]
        return verdict

    def thresholds(self, own: float) -> tuple[float, float]:
        """(τΔ, τφ) for our own ‖Δi‖; infinite without a config."""
        if self._config is None:
            return math.inf, math.inf
        cap = self._config.clip_factor * own
        floor = min(own, cap)
        return (
            min(max(statistics.median(self._delta), floor), cap) if self._delta else floor,
            min(max(statistics.median(self._slow), floor), cap) if self._slow else floor,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able history."""
        return {"delta": list(self._delta), "slow": list(self._slow), "accepted": dict(self._accepted)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the history is malformed; nothing is changed.
        """
        delta, slow, accepted = state.get("delta"), state.get("slow"), state.get("accepted")
        if not _are_distances(delta) or not _are_distances(slow) or not isinstance(accepted, dict):
            raise ValueError("admission history must hold two lists of finite distances and a table of peers")
        if not all(isinstance(peer, str) and type(count) is int and count > 0 for peer, count in accepted.items()):
            raise ValueError("admission history must map peers to positive numbers of exchanges")
        self._delta = deque(delta, maxlen=self._delta.maxlen)
        self._slow = deque(slow, maxlen=self._slow.maxlen)
        self._accepted = {PeerId(peer): count for peer, count in list(accepted.items())[-_MAX_REMEMBERED_PEERS:]}

    def _decide(self, peer: PeerId, distances: Distances) -> Verdict:
        if not (math.isfinite(distances.delta) and math.isfinite(distances.slow)):
            return Verdict.refused("values are not finite or overflow", distances)
        tau_delta, tau_slow = self.thresholds(distances.own)
        factor = self._config.reject_factor if self._config else 1.0
        if distances.delta > factor * tau_delta:
            return Verdict.refused("delta is too far from ours", distances)
        self._far.append(distances.slow > factor * tau_slow)
        if self._far[-1] and not self._are_we_the_odd_one_out():
            return Verdict.refused("slow weights are too far from ours", distances)
        delta_scale = _clip(distances.delta, tau_delta)
        slow_scale = _clip(distances.slow, tau_slow)
        return Verdict(
            kind="clipped" if min(delta_scale, slow_scale) < 1.0 else "averaged",
            weight=self._weight(peer),
            delta_scale=delta_scale,
            slow_scale=slow_scale,
            distances=distances,
        )

    def _are_we_the_odd_one_out(self) -> bool:
        assert self._config is not None
        return sum(self._far) >= self._config.history * _ODD_ONE_OUT_SHARE

    def _weight(self, peer: PeerId) -> float:
        if self._config is None:
            return 1.0
        ramp = min(1.0, self._accepted.get(peer, 0) / self._config.newcomer_exchanges)
        return self._config.newcomer_weight + (1.0 - self._config.newcomer_weight) * ramp


def token_shares(own_tokens: int, partner_tokens: Sequence[int], config: AdmissionConfig | None) -> list[float]:
    """Each partner's share of the token-weighted mean; our own share is the rest.

    Args:
        own_tokens: tokens behind our Δ.
        partner_tokens: the partners' claims, capped at `max_token_ratio` times ours (not without a config).

    Returns:
        One share per partner, equal shares when nobody has tokens.
    """
    cap = config.max_token_ratio * max(own_tokens, 1) if config else math.inf
    counted = [min(max(tokens, 0), cap) for tokens in partner_tokens]
    total = own_tokens + sum(counted)
    if total <= 0:
        return [1.0 / (1 + len(counted))] * len(counted)
    return [tokens / total for tokens in counted]


def _clip(distance: float, tau: float) -> float:
    return 1.0 if distance <= tau else tau / distance


def _are_distances(values: object) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(
        isinstance(value, float) and math.isfinite(value) and value >= 0.0 for value in values
    )
