"""When a training peer measures its held-out loss, and how much of the set it affords.

After every round a part of the set that costs at most 0.3 % of the round's target time, but one piece at least; the whole set
whenever that costs at most 0.2 % of the time since it was last measured, and after the run's last round. So measuring takes half
a percent; a fast machine still measures the whole set every round. The whole cannot come with every checkpoint instead, since
there is one every round.

How far estimates are off (1M preset, 32k tokens, rounds of 3200 tokens each, rms over rounds 5–12, whole measured after round 4):
512 tokens 0.11 nats, 1024 0.08, 2048 0.03, 4096 0.02. A machine of 1000 tokens/s affords 512 per round of 60 s.
"""

from __future__ import annotations

import asyncio

from node.compute import Compute
from node.trainer import Trainer

__all__ = ["Evaluation"]

PART_SHARE = 0.003
"""Of a round's time, for a part of the set."""
WHOLE_SHARE = 0.002
"""Of the time since the whole set was measured, for measuring it again."""
FIRST_PART = 16
"""Before the first measurement has shown what it costs, a part is one in so many pieces."""


class Evaluation:
    """Measures one trainer after its rounds; also bounds what it spends on snapshots that others offer.

    Args:
        trainer: has measured the whole set once before training, so that parts have something to be compared with.
        compute: where the trainer runs.
    """

    def __init__(self, trainer: Trainer, compute: Compute) -> None:
        self._trainer, self._compute = trainer, compute
        self._sync = trainer.manifest.sync
        self._piece_s: float | None = None
        self._whole_at_s = asyncio.get_running_loop().time()

    async def after_round(self, *, last: bool) -> float:
        """The held-out loss now, in nats per token.

        Args:
            last: of the run, so that the number reported for it is exact.
        """
        heldout = self._trainer.heldout
        pieces = self._num_affordable()
        if last or pieces >= heldout.num_pieces or not heldout.is_measured or self._is_whole_due():
            pieces = heldout.num_pieces
            loss, seconds = await self._compute.timed(self._trainer.evaluate)
            self._whole_at_s = asyncio.get_running_loop().time()
        else:
            loss, seconds = await self._compute.timed(self._trainer.estimate, pieces)
        self._piece_s = max(seconds / pieces, 1e-9)
        # A keeper looks at one snapshot per interval of so many rounds.
        self._trainer.affordable_pieces = self._num_affordable() * self._sync.snapshot_rounds
        return loss

    def _num_affordable(self) -> int:
        if self._piece_s is None:
            return max(1, self._trainer.heldout.num_pieces // FIRST_PART)
        return max(1, int(PART_SHARE * self._sync.round_target_s / self._piece_s))

    def _is_whole_due(self) -> bool:
        if self._piece_s is None:
            return False
        since_s = asyncio.get_running_loop().time() - self._whole_at_s
        return self._piece_s * self._trainer.heldout.num_pieces <= WHOLE_SHARE * since_s
