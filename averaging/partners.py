"""Partners' payloads on their way into a step: read (bytes to tensors), measured (norms), weighed (factors)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from averaging.admission import AdmissionConfig, Verdict, token_shares
from averaging.codec import payload_tensor
from averaging.update import RemoteUpdate
from protocol.errors import ProtocolError
from protocol.ids import PeerId

__all__ = ["Partner", "TileNorm", "read_partners", "weigh_partners"]


@dataclass(frozen=True, slots=True)
class Partner:
    """One partner's payloads, still encoded.

    Args:
        peer: who sent them.
        tokens: its claim of tokens.
        delta: uint8 payload of Δ on our device; empty when Δ does not travel.
        slow: uint8 payload of φ on our device; empty when φ does not travel.
        delta_factor: what multiplies Δj − Δi in the step.
        slow_factor: what multiplies φj − φi in the step.
    """

    peer: PeerId
    tokens: int
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

    def total(self) -> float:
        """The norm of all tiles so far; 0 for none."""
        return float(torch.stack(self._squares).double().sum().sqrt()) if self._squares else 0.0


def read_partners(
    updates: Sequence[RemoteUpdate], *, num_bytes: tuple[int, int], device: torch.device
) -> tuple[list[Partner], dict[PeerId, Verdict]]:
    """Bytes to tensors.

    Args:
        updates: as received.
        num_bytes: exact lengths of (Δ, φ).
        device: where the step runs.

    Returns:
        The readable partners, and a refusal for every other.
    """
    readable: list[Partner] = []
    refused: dict[PeerId, Verdict] = {}
    for update in updates:
        try:
            delta = payload_tensor(update.delta, num_bytes=num_bytes[0], device=device)
            slow = payload_tensor(update.slow, num_bytes=num_bytes[1], device=device)
        except ProtocolError as error:
            refused[update.peer] = Verdict.refused(error.reason)
        else:
            readable.append(Partner(update.peer, update.tokens, delta, slow))
    return readable, refused


def weigh_partners(
    partners: Sequence[Partner],
    verdicts: Mapping[PeerId, Verdict],
    *,
    own_tokens: int,
    config: AdmissionConfig | None,
) -> list[Partner]:
    """The accepted partners with their factors: tokens weigh Δ, heads weigh φ, both times newcomer weight and clipping."""
    accepted = [partner for partner in partners if verdicts[partner.peer].kind != "refused"]
    shares = token_shares(own_tokens, [partner.tokens for partner in accepted], config)
    weighed = []
    for partner, share in zip(accepted, shares, strict=True):
        verdict = verdicts[partner.peer]
        weighed.append(
            Partner(
                partner.peer,
                partner.tokens,
                partner.delta,
                partner.slow,
                delta_factor=share * verdict.weight * verdict.delta_scale,
                slow_factor=verdict.weight * verdict.slow_scale / (1 + len(accepted)),
            )
        )
    return weighed
