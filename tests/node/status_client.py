"""Runs the light client in a process of its own: one JSON line per address given, then one about the process."""

from __future__ import annotations

import json
import sys
import time

from node.status import fetch_status
from protocol.errors import LlmNodeError


def main(timeout_s: float, addresses: list[str]) -> None:
    """Ask each address in turn."""
    for address in addresses:
        start_s = time.monotonic()
        outcome: dict[str, object] = {}
        try:
            outcome["document"] = fetch_status(address, timeout_s=timeout_s)
        except LlmNodeError as error:
            outcome |= {"error": type(error).__name__, "text": str(error)}
        outcome["seconds"] = time.monotonic() - start_s
        sys.stdout.write(json.dumps(outcome) + "\n")
    loaded = [name for name in ("torch", "hivemind", "numpy") if name in sys.modules]
    sys.stdout.write(json.dumps({"loaded": loaded}) + "\n")


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
