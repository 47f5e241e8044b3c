"""What this peer has done so far: the one source of its signed record, its live view and its farewell summary."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from protocol.ids import PeerId, RunId
from protocol.records import MAX_LINKS, ExchangeNote, LinkNote, PeerRecord, SnapshotRef
from protocol.transport import Traffic

__all__ = ["Progress", "software_version"]

MAX_LOSS = 1e6
"""Largest loss that a record may hold."""
VAL_WINDOW = 64
"""Rounds whose held-out loss is remembered."""
SPEED_WINDOW = 16
"""Steps over which the speed is averaged."""
LINK_BYTES = 56
LINKS_AND_ADDRESSES_BYTES = 2400
"""Of a record; what else is in it takes at most 1.6 KiB."""


@lru_cache(maxsize=1)
def software_version() -> str:
    """Version of the installed llm-node; looked up once, since that reads and parses a file, and every record holds it."""
    try:
        return version("llm-node")
    except PackageNotFoundError:  # run from a plain source tree
        return "source"


@dataclass(kw_only=True)
class Progress:
    """Counters and latest values of one trainer; changed only on the event loop."""

    run: RunId
    peer: PeerId
    name: str
    inner_steps: int
    traffic: Traffic
    state: Literal["joining", "training", "leaving"] = "joining"
    stage: int | None = None
    next_stage: int | None = None
    iteration: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0
    loss_s: float = 0.0
    links: Sequence[LinkNote] = ()
    plan: int = 0
    round: int = 0
    step: int = 0
    sequences_per_step: int = 0
    tokens: int = 0
    session_tokens: int = 0
    rounds_done: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    val_round: int | None = None
    first_val_loss: float | None = None
    exchanges_ok: int = 0
    exchanges_failed: int = 0
    began_s: float = 0.0
    """Loop time at which the command started."""
    time_to_first_step_s: float | None = None
    training_s: float = 0.0
    """Seconds of this session that went into inner steps."""
    recent: deque[ExchangeNote] = field(default_factory=lambda: deque(maxlen=4))
    snapshots: list[SnapshotRef] = field(default_factory=list)
    sketch: str = ""
    wants_state: bool = False
    started_at_s: float = field(default_factory=time.time)
    _val_losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=VAL_WINDOW))
    _sequence: int = 0
    _first_step_at_s: float = 0.0
    _last_step_ended_s: float = 0.0
    _steps: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=SPEED_WINDOW))

    def count_step(self, *, loss: float, tokens: int, seconds: float, now_s: float) -> None:
        """One inner step was done; `now_s` is the loop's time."""
        if self.time_to_first_step_s is None:
            self.time_to_first_step_s = now_s - self.began_s
            self._first_step_at_s = now_s - seconds
        self.training_s += seconds
        self._last_step_ended_s = now_s
        self.step += 1
        self.tokens += tokens
        self.session_tokens += tokens
        # An exponential mean over a dozen steps: one batch's loss jumps about too much to be read.
        if not math.isfinite(loss):
            self.train_loss = None
        else:
            self.train_loss = loss if self.train_loss is None else 0.9 * self.train_loss + 0.1 * loss
        self._steps.append((seconds, tokens))

    def count_exchange(self, note: ExchangeNote) -> None:
        """One exchange ended. Staying alone because no partner was free is not a failure."""
        self.recent.append(note)
        if note.outcome in ("averaged", "clipped"):
            self.exchanges_ok += 1
        elif note.outcome != "alone":
            self.exchanges_failed += 1

    def count_validation(self, loss: float, round: int) -> None:
        """The held-out loss was measured after `round` rounds."""
        if not math.isfinite(loss):
            return
        self.val_loss, self.val_round = loss, round
        self._val_losses.append((round, loss))
        if self.first_val_loss is None:
            self.first_val_loss = loss

    def val_loss_after(self, round: int) -> float | None:
        """The held-out loss when `round` rounds were done, as far back as is remembered; None before any measurement."""
        earlier = [loss for at, loss in self._val_losses if at <= round]
        return earlier[-1] if earlier else next((loss for _, loss in self._val_losses), None)

    @property
    def tokens_per_s(self) -> float:
        """Training speed over the last steps, exchanges not deducted."""
        seconds = sum(s for s, _ in self._steps)
        return sum(t for _, t in self._steps) / seconds if seconds else 0.0

    @property
    def training_share(self) -> float | None:
        """Share of the wall time that went into inner steps, from the beginning of this session's first step to the end of its
        latest; the rest went into packing, applying, measuring, saving and waiting. None before the first step."""
        wall_s = self._last_step_ended_s - self._first_step_at_s
        return min(1.0, self.training_s / wall_s) if wall_s > 0 else None

    @property
    def eta_s(self) -> float | None:
        """Expected seconds until the round's last step; None before the first one."""
        if not self._steps:
            return None
        return max(self.inner_steps - self.step, 0) * sum(s for s, _ in self._steps) / len(self._steps)

    def record(self, addresses: Sequence[str]) -> PeerRecord:
        """This peer's record as of now. Its sequence grows strictly, across restarts too, even if the clock steps back a
        little within a session."""
        self._sequence = max(self._sequence + 1, time.time_ns() // 1_000_000)
        return PeerRecord(
            run=self.run,
            peer=self.peer,
            sequence=self._sequence,
            role="trainer",
            state=self.state,
            name=self.name[:32],
            version=software_version(),
            addresses=list(addresses)[:8],
            started_at_s=self.started_at_s,
            sent_at_s=time.time(),
            stage=self.stage,
            next_stage=self.next_stage,
            iteration=self.iteration,
            forward_s=self.forward_s,
            backward_s=self.backward_s,
            loss_s=self.loss_s,
            links=list(self.links)[: _room_for_links(addresses)],
            plan=self.plan,
            round=self.round,
            step=min(self.step, self.inner_steps),
            inner_steps=self.inner_steps,
            sequences_per_step=self.sequences_per_step,
            tokens=self.tokens,
            tokens_per_s=round(self.tokens_per_s, 1),
            train_loss=_reportable(self.train_loss),
            val_loss=_reportable(self.val_loss),
            val_round=self.val_round,
            eta_s=None if self.eta_s is None else round(self.eta_s, 1),
            sent_bytes=self.traffic.sent_bytes,
            received_bytes=self.traffic.received_bytes,
            exchanges_ok=self.exchanges_ok,
            exchanges_failed=self.exchanges_failed,
            recent=list(self.recent),
            snapshots=self.snapshots[-2:],
            sketch=self.sketch,
            wants_state=self.wants_state,
        )


def _room_for_links(addresses: Sequence[str]) -> int:
    """How many links fit into a record beside its addresses."""
    return max(0, min(MAX_LINKS, (LINKS_AND_ADDRESSES_BYTES - sum(map(len, addresses[:8]))) // LINK_BYTES))


def _reportable(loss: float | None) -> float | None:
    """The loss as a record can carry it; a training run that has diverged has none."""
    return loss if loss is not None and 0.0 <= loss <= MAX_LOSS else None
