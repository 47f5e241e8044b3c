"""What two partners swap: one round's progress as encoded bytes, with the few numbers needed to weigh it.

The exchange moves these bytes without looking inside them; `averaging.replica` packs and reads them. Both buffers have a
length that the run's manifest fixes (model shape × codec), so a receiver knows the exact byte count before the first byte
arrives. Nothing here copies: the views point into the owner's buffers and stay valid until the exchange has returned.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.ids import PeerId

__all__ = ["RemoteUpdate", "Update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Our own progress of one round, ready to be sent.

    Args:
        round: the round just finished, counted from 0.
        tokens: training tokens behind Δ (its weight in the mean).
        delta: encoded Δ = θ − φ, flat bytes.
        slow: encoded φ, flat bytes; empty when only Δ travels.
    """

    round: int
    tokens: int
    delta: memoryview
    slow: memoryview

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire, headers not counted."""
        return self.delta.nbytes + self.slow.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteUpdate:
    """A partner's progress: signed by `peer`, of the exact length, and matching its announced digest. The values inside
    are NOT checked (finite, plausible norm): that is admission's work.

    Args:
        peer: the authenticated sender.
        round: the sender's own round, within the agreed window of ours.
        tokens: the sender's claim of how much training is behind Δ.
        delta: encoded Δ, same length as ours.
        slow: encoded φ, same length as ours.
    """

    peer: PeerId
    round: int
    tokens: int
    delta: memoryview
    slow: memoryview
