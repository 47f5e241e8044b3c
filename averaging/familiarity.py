"""How well a peer knows its partners, and how much weight that gives them.

A partner's weight rises over its first accepted exchanges, so that a stranger, or one of many made-up identities, moves an
established peer little. It never lies below the share of strangers among the partners accepted last: while everybody is new,
being new says nothing (with a quarter of the weight for everybody, three honest replicas drifted apart faster than they were
pulled together), and in a large swarm one rarely meets twice. Made-up identities gain by that only what their share of all
meetings is, and each could have had it after `newcomer_exchanges` meetings anyway.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from protocol.ids import PeerId

__all__ = ["Familiarity"]

MAX_REMEMBERED = 4096
"""Partners; forgetting the longest unseen one costs it its weight, nothing else."""


class Familiarity:
    """The partners accepted so far.

    Args:
        newcomer_weight: weight of a partner never accepted before, where all others are known.
        num_exchanges: accepted exchanges until a partner is known and its weight is 1.
        window: accepted partners over which the share of strangers is taken.
    """

    def __init__(self, *, newcomer_weight: float, num_exchanges: int, window: int) -> None:
        self._newcomer_weight, self._num_exchanges = newcomer_weight, num_exchanges
        self._accepted: dict[PeerId, int] = {}
        self._strangeness: deque[float] = deque(
            [1.0] * window, maxlen=window
        )  # before the first meeting all are strangers

    def weight(self, peer: PeerId) -> float:
        """Weight of this partner's next update, in [newcomer_weight, 1]."""
        strangers = sum(self._strangeness) / len(self._strangeness)
        return self._newcomer_weight + (1.0 - self._newcomer_weight) * max(1.0 - self._strange(peer), strangers)

    def met(self, peer: PeerId) -> None:
        """An update of this partner was accepted."""
        self._strangeness.append(self._strange(peer))
        self._accepted[peer] = self._accepted.pop(peer, 0) + 1  # moves the peer to the end: most recently seen
        if len(self._accepted) > MAX_REMEMBERED:
            del self._accepted[next(iter(self._accepted))]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"accepted": dict(self._accepted), "strangeness": list(self._strangeness)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it is malformed; nothing is changed.
        """
        accepted, strangeness = state.get("accepted"), state.get("strangeness")
        if not isinstance(accepted, dict) or not all(
            isinstance(peer, str) and type(count) is int and count > 0 for peer, count in accepted.items()
        ):
            raise ValueError("admission history must map peers to positive numbers of exchanges")
        if not isinstance(strangeness, list) or not all(
            isinstance(value, float) and 0.0 <= value <= 1.0 for value in strangeness
        ):
            raise ValueError("admission history must hold numbers between 0 and 1 for the strangeness of partners")
        self._accepted = {PeerId(peer): count for peer, count in list(accepted.items())[-MAX_REMEMBERED:]}
        self._strangeness.extend(strangeness)

    def _strange(self, peer: PeerId) -> float:
        """1 for a partner never accepted, 0 for a known one."""
        return 1.0 - min(1.0, self._accepted.get(peer, 0) / self._num_exchanges)
