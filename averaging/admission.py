"""Whether, and how strongly, a stranger's update may move us: SECURITY.md, Byzantine peers, steps 1–3.

With a single partner there is no majority to ask, so robustness comes from our own history. For a partner j

    d = ‖Δj − Δi‖    e = ‖φj − φi‖    s = ‖Δi‖, or our usual one (median of the last rounds) if that is more
    τ = median of the last accepted distances, held between s and clip_factor·s             (one τ for d, one for e)
    far:     d or e is beyond reject_factor·τ
    refused: not finite; unreadable; d beyond IMPLAUSIBLE·τ; or far, while most of the other partners are near
    else accepted, its difference scaled to at most τ and weighed by how well we know the partner (averaging/familiarity.py)

The bound follows our own progress, which no partner can inflate: one exchange moves us by at most clip_factor·s, whoever sends
what. All peers begin with one φ, so the first accepted e is 0, and a median alone would refuse everybody from then on: hence the
lower end. A partner's claim of tokens counts only up to a multiple of our own, so the weight is never its to choose.

Refusing adds little to clipping, since an attacker can stay just below the limit, and it has locked honest swarms up: after
a partition, and where few peers with a high learning rate drift apart. So a far partner is refused only while more than
REFUSING_MAJORITY of the other partners met last were near. A peer thus never refuses a third of its partners, and a swarm
whose peers are all far from each other goes on averaging. A peer that is farther away from everybody than clipped steps can mend
is astray (`is_astray`): it should fetch the swarm's state.

φ that the lattice codec cannot read (e is infinite) is no sign of malice, nor of a large distance: the codec's window was too small
for it, on either side. It says nothing about who is near, and both windows double (averaging/window.py). Only where that has not
helped either for several times as many meetings are we astray.

Norms bound what one exchange can do; they do not tell good from bad (an attacker can stay at the threshold). The validation gate
that does is a separate step.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from averaging.familiarity import Familiarity
from protocol.ids import PeerId

__all__ = ["Admission", "AdmissionConfig", "Distances", "Verdict", "token_shares"]

REFUSING_MAJORITY = 2 / 3
"""A far partner is refused only while more than this share of the others met last were near."""
IMPLAUSIBLE = 30.0
"""Progress that differs from ours by more than so many τ is no progress: a peer of 16 times our speed stays below."""
ASTRAY_MEETINGS = 4
"""So many partners in a row that are too far to be averaged with mean that we are the odd one out …"""
UNREADABLE_SHARE = 1 / 4
"""… where one whose φ cannot be read counts as this share of a meeting: in 16 of them the lattice's window has gone from its
narrowest to its widest …"""
ASTRAY_PARTNERS = 2
"""… if at least so many of them are different peers: between two alone nobody can tell which one is."""
MENDABLE_LIMITS = 10.0
"""Beyond so many times the limit at which a partner is far, clipped steps take too long to mend the distance."""


@dataclass(frozen=True, kw_only=True)
class AdmissionConfig:
    """Bounds on what a partner can do; field names as in the manifest's [safety].

    Args:
        history: accepted distances whose median bounds the next one.
        clip_factor: upper end of τ, in norms of our own Δ.
        reject_factor: a distance beyond this many τ is far.
        newcomer_weight: weight of a partner never accepted before, where all others are known.
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
        slow: e = ‖φj − φi‖, 0 where φ does not travel, infinite where it is too far away to be read.
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
        self.least_progress = 0.0
        """Norm that counts as our own progress at least. Consolidation sets it, since it makes no progress of its own."""
        self._is_open = config is None
        self._config = config = config or AdmissionConfig()
        self._delta: deque[float] = deque(maxlen=config.history)
        self._slow: deque[float] = deque(maxlen=config.history)
        self._own: deque[float] = deque(maxlen=config.history)
        self._far: dict[PeerId, bool] = {}  # the partners met last and what they were then; the latest at the end
        # Partners in a row that were too far to be averaged with, and how much each counts.
        self._hopeless: deque[tuple[PeerId, float]] = deque(maxlen=math.ceil(ASTRAY_MEETINGS / UNREADABLE_SHARE))
        self._familiarity = Familiarity(
            newcomer_weight=config.newcomer_weight, num_exchanges=config.newcomer_exchanges, window=config.history
        )

    @property
    def is_astray(self) -> bool:
        """Whether we are the odd one out: the last partners, several different ones, were all too far to be averaged with."""
        num_meetings, partners = sum(share for _, share in self._hopeless), {peer for peer, _ in self._hopeless}
        return num_meetings >= ASTRAY_MEETINGS and len(partners) >= ASTRAY_PARTNERS

    @property
    def usual_distance(self) -> float:
        """Median of ‖φj − φi‖ of the last accepted partners, or of our own ‖Δi‖ if that is more; 0 without any history."""
        return max(_median(self._slow), _median(self._own))

    def judge(self, peer: PeerId, distances: Distances) -> Verdict:
        """Decide about one update, and remember it."""
        if not (math.isfinite(distances.delta) and math.isfinite(distances.slow)):
            if math.isinf(distances.slow):
                self._hopeless.append((peer, UNREADABLE_SHARE))
            return Verdict.refused("values are not finite or overflow", distances)
        if self._is_open:
            self._hopeless.clear()
            return Verdict(kind="averaged", distances=distances)
        verdict = self._decide(peer, distances)
        self._own.append(distances.own)
        if verdict.kind != "refused":
            self._delta.append(distances.delta)
            self._slow.append(distances.slow)
            self._familiarity.met(peer)
        return verdict

    def thresholds(self, own: float) -> tuple[float, float]:
        """(τΔ, τφ) for our own ‖Δi‖; infinite without a config."""
        if self._is_open:
            return math.inf, math.inf
        progress = max(own, _median(self._own), self.least_progress)
        cap = self._config.clip_factor * progress
        floor = min(progress, cap)
        return min(max(_median(self._delta), floor), cap), min(max(_median(self._slow), floor), cap)

    def start_anew(self) -> None:
        """The swarm's weights have replaced ours: who was near and who was far says nothing any more."""
        self._slow.clear()
        self._far.clear()
        self._hopeless.clear()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able history."""
        return {
            "delta": list(self._delta),
            "slow": list(self._slow),
            "own": list(self._own),
            "far": dict(self._far),
            "familiarity": self._familiarity.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the history is malformed; nothing is changed.
        """
        delta, slow, own = (_distances(state.get(name)) for name in ("delta", "slow", "own"))
        far, familiarity = state.get("far"), state.get("familiarity")
        if not isinstance(far, dict) or not isinstance(familiarity, dict):
            raise ValueError("admission history must hold two tables of partners")
        if not all(isinstance(peer, str) and isinstance(is_far, bool) for peer, is_far in far.items()):
            raise ValueError("admission history must say of each partner whether it was far")
        self._familiarity.load_state_dict(familiarity)
        for own_history, loaded in ((self._delta, delta), (self._slow, slow), (self._own, own)):
            own_history.clear()
            own_history.extend(loaded)
        self._far = {PeerId(peer): is_far for peer, is_far in list(far.items())[-self._config.history :]}
        self._hopeless.clear()

    def _decide(self, peer: PeerId, distances: Distances) -> Verdict:
        taus = self.thresholds(distances.own)
        factor = self._config.reject_factor
        far_delta, far_slow = distances.delta > factor * taus[0], distances.slow > factor * taus[1]
        self._note(peer, is_far=far_delta or far_slow, is_hopeless=distances.slow > MENDABLE_LIMITS * factor * taus[1])
        is_implausible = distances.delta > IMPLAUSIBLE * taus[0]
        if is_implausible or ((far_delta or far_slow) and self._are_others_near(peer)):
            return Verdict.refused(f"{'delta is' if far_delta else 'slow weights are'} too far from ours", distances)
        delta_scale, slow_scale = _clip(distances.delta, taus[0]), _clip(distances.slow, taus[1])
        return Verdict(
            kind="clipped" if min(delta_scale, slow_scale) < 1.0 else "averaged",
            weight=self._familiarity.weight(peer),
            delta_scale=delta_scale,
            slow_scale=slow_scale,
            distances=distances,
        )

    def _note(self, peer: PeerId, *, is_far: bool, is_hopeless: bool) -> None:
        self._far.pop(peer, None)
        self._far[peer] = is_far
        if len(self._far) > self._config.history:
            del self._far[next(iter(self._far))]
        if is_hopeless:
            self._hopeless.append((peer, 1.0))
        else:
            self._hopeless.clear()

    def _are_others_near(self, peer: PeerId) -> bool:
        others = [is_far for other, is_far in self._far.items() if other != peer]
        return others.count(False) > REFUSING_MAJORITY * len(others)


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


def _median(values: Sequence[float] | deque[float]) -> float:
    return statistics.median(values) if values else 0.0


def _distances(values: object) -> list[float]:
    if isinstance(values, list) and all(isinstance(v, float) and math.isfinite(v) and v >= 0.0 for v in values):
        return values
    raise ValueError("admission history must hold lists of finite distances")
