"""Which foreign bucket of the directory a peer reads in a round, so that a large swarm does not fall apart into its buckets.

An exchange needs two peers that know each other. If all peers of a round read one and the same foreign bucket, its own peers would
not know those who read it, and would turn them down. So the round's lot does not name a bucket but a difference: bucket b
reads bucket b XOR lot, and that one reads bucket b. Over the rounds every bucket meets every other.
"""

from __future__ import annotations

import hashlib

from protocol.ids import PeerId, RunId

__all__ = ["foreign_bucket"]


def foreign_bucket(run: RunId, round: int, peer: PeerId) -> bytes:
    """The hash whose first bits name the bucket (`Directory.refresh(extra=…)`) that `peer` reads besides its own in `round`.

    If a's foreign bucket is b's own, then b's foreign bucket is a's own, whatever the number of buckets.
    """
    lot = hashlib.sha256(f"{run}/bucket/{round}".encode()).digest()
    own = hashlib.sha256(peer.encode()).digest()  # as the directory does
    return bytes(a ^ b for a, b in zip(lot, own, strict=True))
