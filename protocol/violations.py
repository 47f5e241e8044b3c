"""Who broke the rules how often. Identities cost nothing, so only the most recent few thousand offenders are remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from protocol.ids import PeerId

__all__ = ["MAX_OFFENDERS", "Violations"]

MAX_OFFENDERS = 4096


class Violations(Mapping[PeerId, int]):
    """Broken rules per peer."""

    def __init__(self) -> None:
        self._counts: OrderedDict[PeerId, int] = OrderedDict()

    def blame(self, peer: PeerId) -> None:
        """Count one against `peer`."""
        self._counts[peer] = self._counts.pop(peer, 0) + 1
        if len(self._counts) > MAX_OFFENDERS:
            self._counts.popitem(last=False)

    def __getitem__(self, peer: PeerId) -> int:
        """How many were counted against `peer`; 0 for those who broke none."""
        return self._counts.get(peer, 0)

    def __iter__(self) -> Iterator[PeerId]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)
