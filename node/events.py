"""What happens in a node, as structured events: a name and fields.

Everything that somebody may want to know (the live view, the event log on disk, `--json` output, the tests) reads these;
nothing else in the node prints. An event is one JSON object per line: {"t": unix seconds, "event": name, ...fields}.
Warnings that libraries and the lower layers write with `logging` become events too (`LogToEvents`), so that they land in the event
log and not in the middle of a live view.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["EventLog", "Listener", "LogToEvents", "describe_record"]

Listener = Callable[[str, dict[str, Any]], None]
"""Called with an event's name and its fields."""

MAX_LOG_BYTES = 16 << 20


class EventLog:
    """Fans events out to listeners and, if given a path, appends them to a file of bounded size.

    Args:
        path: file to append to; rotated once to `<path>.old` at 16 MiB. None keeps nothing on disk.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._listeners: list[Listener] = []
        self._disk_problem: str | None = None

    def listen(self, listener: Listener) -> None:
        """Call `listener` for every event from now on."""
        self._listeners.append(listener)

    def write_to(self, path: Path) -> None:
        """Append to `path` from now on."""
        self._path = path

    def emit(self, event: str, **fields: Any) -> None:
        """Record that something happened. Never raises for a full disk: training is worth more than its log.

        The listeners hear once that the log cannot be written (`disk_error`), and once that it can again (`disk_recovered`).
        """
        self._tell(event, fields)
        if self._path is None:
            return
        problem = self._append(self._path, event, fields)
        if (problem is None) != (self._disk_problem is None):
            self._disk_problem = problem
            kind = "disk_recovered" if problem is None else "disk_error"
            self._tell(kind, {"path": str(self._path)} | ({} if problem is None else {"reason": problem}))

    def _tell(self, event: str, fields: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener(event, fields)

    @staticmethod
    def _append(path: Path, event: str, fields: dict[str, Any]) -> str | None:
        """Write one line; returns why it failed."""
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, default=str)
        try:
            if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
                path.replace(path.with_suffix(".old"))
            with path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            return error.strerror or type(error).__name__
        return None


class LogToEvents(logging.Handler):
    """Turns log records into events named `log`."""

    def __init__(self, events: EventLog) -> None:
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging`, from any thread."""
        self._events.emit("log", level=record.levelname.lower(), source=record.name, text=describe_record(record))


def describe_record(record: logging.LogRecord) -> str:
    """A log record in one line: its message, then its extra fields, then the error it carries."""
    extra = [f"{key}={value}" for key, value in vars(record).items() if key not in _RECORD_FIELDS]
    raised = record.exc_info[1] if record.exc_info else None
    error = [] if raised is None else [f"{type(raised).__name__}: {raised}"]
    return " ".join(" ".join([record.getMessage(), *extra, *error]).split())


_RECORD_FIELDS = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "taskName"}
