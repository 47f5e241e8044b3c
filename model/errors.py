"""Errors this package raises on purpose. Each message is one line: the cause, then the remedy.

Both are `ValueError`s: the input is wrong, not the program. The command line shows the message alone, without a traceback.
"""

from __future__ import annotations

__all__ = ["CheckpointError", "DataError"]


class DataError(ValueError):
    """Text, tokens, a tokenizer or a setting that can not be used."""


class CheckpointError(ValueError):
    """Weights or a checkpoint that can not be read, written or trusted."""
