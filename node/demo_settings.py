"""What the demo trains: a model small enough to learn something in three minutes on two cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DEMO_HELDOUT_TOKENS", "DEMO_MAX_CHARS", "DEMO_MODEL", "DEMO_SETTINGS", "DemoOptions", "settings_for"]

DEMO_MODEL = "1m"
DEMO_MAX_CHARS = 6_000_000
DEMO_HELDOUT_TOKENS = 8192
DEMO_SETTINGS = {
    "inner.sequence_tokens": 128,
    "inner.warmup_steps": 40,
    "inner.min_sequences": 8,
    "inner.max_sequences": 32,
    "sync.inner_steps": 25,
    "sync.round_target_s": 8.0,
    "sync.exchange_timeout_s": 20.0,
    "sync.snapshot_rounds": 2,
    "safety.newcomer_weight": 1.0,  # all peers belong to whoever starts the demo
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """See `llm-node demo --help`."""

    peers: int
    rounds: int
    seed: int
    folder: Path
    memory: bool = False


def settings_for(options: DemoOptions) -> dict[str, Any]:
    """Manifest settings of a demo run."""
    return DEMO_SETTINGS | {"sync.total_rounds": options.rounds, "sync.decay_rounds": max(1, options.rounds // 4)}
