"""What happens in a node, as structured events: a name and fields.

Everything that somebody may want to know (the live view, the event log on disk, `--json` output, the tests) reads these;
nothing else in the node prints. An event is one JSON object per line: {"t": unix seconds, "event": name, ...fields}.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["EventLog", "Listener"]

Listener = Callable[[str, dict[str, Any]], None]
"""Called with an event's name and its fields."""

logger = logging.getLogger(__name__)

MAX_LOG_BYTES = 16 << 20


class EventLog:
    """Fans events out to listeners and, if given a path, appends them to a file of bounded size.

    Args:
        path: file to append to; rotated once to `<path>.old` at 16 MiB. None keeps nothing on disk.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._listeners: list[Listener] = []
        self._disk_failed = False

    def listen(self, listener: Listener) -> None:
        """Call `listener` for every event from now on."""
        self._listeners.append(listener)

    def write_to(self, path: Path) -> None:
        """Append to `path` from now on."""
        self._path = path

    def emit(self, event: str, **fields: Any) -> None:
        """Record that something happened. Never raises for a full disk: training is worth more than its log."""
        for listener in self._listeners:
            listener(event, fields)
        if self._path is None:
            return
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, default=str)
        try:
            if self._path.exists() and self._path.stat().st_size > MAX_LOG_BYTES:
                self._path.replace(self._path.with_suffix(".old"))
            with self._path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            if not self._disk_failed:
                logger.warning("event log %s: %s", self._path, error.strerror)
            self._disk_failed = True
