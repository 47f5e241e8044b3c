"""What the owner of a peer chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["PeerOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """What the owner of a peer chooses.

    Attributes:
        name: shown on the status page.
        http: host and port of a status page served here, or None.
        local_data: folder of the volunteer's own text, for a run of kind `local`.
        sequences: fixed sequences per step; 0 measures the machine and adapts.
        threads: torch's threads; 0 takes one or all, whichever is faster.
        max_rounds: leave after so many rounds; 0 stays as long as the run lasts.
        device: torch device.
        memory_bytes: training may take so much memory; 0 for what is free.
        age_s: how long the command has been running already; counts towards the time to the first step.
    """

    name: str = ""
    http: tuple[str, int] | None = None
    local_data: Path | None = None
    sequences: int = 0
    threads: int = 0
    max_rounds: int = 0
    device: str = "cpu"
    memory_bytes: int = 0
    age_s: float = 0.0
