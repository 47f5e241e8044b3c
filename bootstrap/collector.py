"""Carries signed records from the directory into the store; the node calls it with every heartbeat.

It only reads: peers publish their records for their own sake (to be found and paired), so a page needs no reporting
protocol, and any peer can collect. The directory has checked signatures and bounds already.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from bootstrap.store import StatusStore
from protocol.ids import PeerId
from protocol.records import PeerRecord

__all__ = ["PRUNE_EVERY", "Collector", "RecordSource"]

PRUNE_EVERY = 100
"""Passes between two prunings of the history."""

_log = logging.getLogger(__name__)


class RecordSource(Protocol):
    """The part of `protocol.directory.Directory` that is needed here."""

    async def refresh(self) -> object:
        """Read the directory anew; network failures are not raised."""

    @property
    def all_records(self) -> Mapping[PeerId, PeerRecord]:
        """All live records, our own and those of leaving peers included."""


class Collector:
    """Copies what a directory shows into a store.

    Args:
        directory: where records come from.
        store: where they go; owned by the caller.
        clock: Unix time, replaceable for tests.
    """

    def __init__(self, directory: RecordSource, store: StatusStore, *, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._store = store
        self._clock = clock
        self._num_passes = 0

    async def collect(self) -> int:
        """One pass. Cancelling it leaves the store whole, since a pass is written in one transaction.

        Returns:
            Number of new records; 0 also when the network failed, which the directory counts and the next pass may mend.
        """
        await self._directory.refresh()
        had_problem = self._store.problem is not None
        num_new = self._store.observe(self._directory.all_records.values(), now_s=self._clock())
        if self._store.problem is not None and not had_problem:
            _log.warning("status history is not written", extra={"reason": self._store.problem})
        self._num_passes += 1
        if self._num_passes % PRUNE_EVERY == 0:
            self._store.prune()
        return num_new
