"""Which donor fetches which leaf: a pure work queue with stealing at the end.

Leaves go out in ascending order, one by one, so a fast donor simply takes more of them. When none is left to give out, an
idle donor doubles up on a leaf that another one still owes; so a stalled or slow donor holds up nothing, and the price is at
most one leaf sent twice per idle donor at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from protocol.ids import PeerId

__all__ = ["LeafQueue"]

MAX_HOLDERS = 2


class LeafQueue:
    """Leaves that are wanted, and who has been asked for them.

    Args:
        missing: indices of the wanted leaves.
    """

    def __init__(self, missing: Iterable[int]) -> None:
        self._waiting = deque(sorted(missing))
        self._holders: dict[int, set[PeerId]] = {}  # leaves asked for, oldest first

    @property
    def num_missing(self) -> int:
        """Leaves not yet done."""
        return len(self._waiting) + len(self._holders)

    def take(self, donor: PeerId, *, is_idle: bool) -> int | None:
        """The next leaf to ask `donor` for; None if there is nothing for it now.

        Args:
            donor: who will be asked.
            is_idle: whether it owes nothing else; only then does it get a leaf that somebody else owes.
        """
        if self._waiting:
            index = self._waiting.popleft()
            self._holders[index] = {donor}
            return index
        if is_idle:
            for index in reversed(self._holders):  # the newest is the furthest from arriving
                holders = self._holders[index]
                if donor not in holders and len(holders) < MAX_HOLDERS:
                    holders.add(donor)
                    return index
        return None

    def give_back(self, donor: PeerId, indices: Iterable[int]) -> None:
        """`donor` will not deliver these after all; those that nobody else owes are given out again, first."""
        for index in sorted(indices, reverse=True):
            holders = self._holders.get(index, set())
            holders.discard(donor)
            if not holders and self._holders.pop(index, None) is not None:
                self._waiting.appendleft(index)

    def done(self, index: int) -> bool:
        """Leaf `index` is here; returns whether that is news."""
        return self._holders.pop(index, None) is not None
