"""What a DHT record must look like whoever made it, checked on both transports before the application's own validator."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["MAX_KEY_CHARS", "MAX_TTL_S", "MAX_VALUE_BYTES", "Validator", "is_admissible"]

Validator = Callable[[str, str, bytes, float, float], bool]
"""(key, subkey, value, expires_at_s, now_s) → whether the record may be kept and shown."""

MAX_KEY_CHARS = 256
MAX_VALUE_BYTES = 4096
MAX_TTL_S = 600.0


def is_admissible(
    validator: Validator | None, key: str, subkey: str, value: bytes, expires_at_s: float, now_s: float
) -> bool:
    """Whether a record keeps the size and time limits and satisfies `validator` (None accepts all that keep them)."""
    if not (math.isfinite(expires_at_s) and now_s < expires_at_s <= now_s + MAX_TTL_S):
        return False
    if len(key) > MAX_KEY_CHARS or len(subkey) > MAX_KEY_CHARS or len(value) > MAX_VALUE_BYTES:
        return False
    return validator is None or validator(key, subkey, value, expires_at_s, now_s)
