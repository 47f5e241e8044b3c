"""Partners' payloads on their way into a step: read (bytes to tensors), measured (norms), weighed (factors)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from averaging.admission import Admission, Distances, Verdict, token_shares
from averaging.codec import payload_tensor
from averaging.fragments import Fragments
from averaging.replica_config import ReplicaConfig
from averaging.update import RemoteUpdate, Update
from protocol.errors import ProtocolError
from protocol.ids import PeerId

__all__ = ["Measurement", "Partner", "TileNorm", "read_partners", "weigh_partners"]


@dataclass(frozen=True, slots=True)
class Partner:
    """One partner's payloads, still encoded.

    Args:
        peer: who sent them.
        tokens: its claim of tokens.
        lag_rounds: rounds between its own and ours, in either direction.
        delta: uint8 payload of Δ on our device; empty when Δ does not travel.
        slow: uint8 payload of φ or θ on our device; empty when neither travels.
        delta_factor: what multiplies Δj − Δi in the step.
        slow_factor: what multiplies φj − φi in the step.
    """

    peer: PeerId
    tokens: int
    lag_rounds: int
    delta: Tensor
    slow: Tensor
    delta_factor: float = 0.0
    slow_factor: float = 0.0


class TileNorm:
    """L2 norm of a vector that passes by in tiles: fp32 within a tile, float64 across. It stays on the device until `total`,
    so that a GPU is asked only once. Any NaN, infinity or overflow makes it non-finite."""

    def __init__(self) -> None:
        self._squares: list[Tensor] = []

    def add(self, tile: Tensor) -> None:
        """Count one tile, fp32 [n]."""
        self._squares.append(torch.dot(tile, tile))

    def add_squares(self, squares: Tensor) -> None:
        """Count sums of squares, fp32 [n]."""
        self._squares.append(squares.double().sum())

    def total(self) -> float:
        """The norm of all tiles so far; 0 for none."""
        return float(torch.stack(self._squares).double().sum().sqrt()) if self._squares else 0.0


@dataclass(slots=True)
class Measurement:
    """What one pass over a partner's payloads finds.

    Args:
        delta: norm of Δj − Δi.
        slow: norm of φj − φi.
        num_unreadable: blocks of φ that the lattice codec could not tell.
        num_blocks: blocks of φ in all.
    """

    delta: TileNorm = field(default_factory=TileNorm)
    slow: TileNorm = field(default_factory=TileNorm)
    num_unreadable: int = 0
    num_blocks: int = 0

    @property
    def is_too_far(self) -> bool:
        """Whether so little could be read that nothing of it should be used."""
        return 2 * self.num_unreadable > self.num_blocks

    def judge(self, peer: PeerId, *, own: float, admission: Admission) -> Verdict:
        """Ask admission; a partner that is too far to be read is infinitely far, one whose values overflow is not a number.

        Args:
            own: ‖Δi‖.
        """
        slow = self.slow.total()
        if self.is_too_far:
            slow = math.inf
        elif math.isinf(slow):
            slow = math.nan
        verdict = admission.judge(peer, Distances(delta=self.delta.total(), slow=slow, own=own))
        if self.is_too_far:
            return replace(verdict, reason="replicas are too far apart for the lattice codec")
        return verdict


def read_partners(
    updates: Sequence[RemoteUpdate], *, own: Update, fragments: Fragments, device: torch.device
) -> tuple[list[Partner], dict[PeerId, Verdict]]:
    """Bytes to tensors.

    Args:
        updates: as received.
        own: our update of this round, whose lengths and fragment theirs must have.
        fragments: what each round exchanges.
        device: where the step runs.

    Returns:
        The readable partners, and a refusal for every other.
    """
    readable: list[Partner] = []
    refused: dict[PeerId, Verdict] = {}
    for update in updates:
        lag_rounds = abs(update.round - own.round)
        if not fragments.is_same(update.round, own.round):
            refused[update.peer] = Verdict.refused(f"round {update.round} has another fragment than round {own.round}")
            continue
        try:
            delta = payload_tensor(update.delta, num_bytes=own.delta.nbytes, device=device)
            slow = payload_tensor(update.slow, num_bytes=own.slow.nbytes, device=device)
        except ProtocolError as error:
            refused[update.peer] = Verdict.refused(error.reason)
        else:
            readable.append(Partner(update.peer, update.tokens, lag_rounds, delta, slow))
    return readable, refused


def weigh_partners(
    partners: Sequence[Partner], verdicts: Mapping[PeerId, Verdict], *, own_tokens: int, config: ReplicaConfig
) -> list[Partner]:
    """The accepted partners with their factors: tokens weigh Δ, heads weigh φ, both times newcomer weight, clipping and age.

    Both ends of a pair see the same lag, so its decay does not disturb the mean of φ.
    """
    accepted = [partner for partner in partners if verdicts[partner.peer].kind != "refused"]
    shares = token_shares(own_tokens, [partner.tokens for partner in accepted], config.admission)
    weighed = []
    for partner, share in zip(accepted, shares, strict=True):
        verdict = verdicts[partner.peer]
        weight = verdict.weight * config.lag_decay**partner.lag_rounds
        weighed.append(
            replace(
                partner,
                delta_factor=share * weight * verdict.delta_scale,
                slow_factor=weight * verdict.slow_scale / (1 + len(accepted)),
            )
        )
    return weighed
