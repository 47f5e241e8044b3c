"""Long-running commands in a terminal: the event loop, the signals, and what is drawn meanwhile.

The first Ctrl-C (or SIGTERM) leaves properly: the step and the write in progress are finished, the directory hears a
goodbye. Before training has begun there is nothing to finish, and it ends at once. A second Ctrl-C always ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from model.errors import CheckpointError, DataError
from node.coordinator import CoordinatorOptions, coordinate
from node.events import EventLog, LogToEvents
from node.home import Home
from node.join import JoinOptions, join
from node.peer import Peer, PeerOptions, Summary
from node.view import BootstrapView, JsonView, LiveView, PlainView, run_lines, summary_lines
from protocol.errors import LlmNodeError, first_leaf

__all__ = ["run_bootstrap", "run_join"]

T = TypeVar("T")

EXPECTED = (LlmNodeError, DataError, CheckpointError)
"""Errors whose message is one line for the user."""


def run_bootstrap(home: Home, manifest: Path, options: CoordinatorOptions, *, as_json: bool) -> None:
    """Serve a run until a signal comes."""
    console = Console()
    view = BootstrapView(console)

    async def main(log: EventLog) -> None:
        stopping = asyncio.Event()
        _on_signals(stopping.set)
        with contextlib.nullcontext() if as_json else view:
            await coordinate(home, manifest, options, events=log, stopping=stopping)

    with _event_log() as log:
        log.listen(JsonView(console) if as_json else view)
        _run(main(log))


def run_join(home: Home, network: JoinOptions, options: PeerOptions, *, as_json: bool) -> None:
    """Take part in a run until it ends or a signal comes, and say farewell."""
    console = Console()
    live = LiveView(console) if console.is_terminal and not as_json else None

    async def main(log: EventLog) -> Summary:
        this = asyncio.current_task()
        assert this is not None
        _on_signals(this.cancel)  # until there is a peer that could say goodbye
        async with contextlib.AsyncExitStack() as stack:

            async def on_start(peer: Peer) -> None:
                _on_signals(lambda: _leave(peer, this, log))
                if not as_json:
                    _print_lines(console, run_lines(peer.manifest))
                if live is not None:
                    await stack.enter_async_context(live.showing(peer))

            return await join(home, network, options, events=log, on_start=on_start)

    with _event_log() as log:
        log.listen(JsonView(console) if as_json else live or PlainView(console))
        summary = _run(main(log))
        if as_json:
            log.emit("summary", **asdict(summary))
        else:
            _print_lines(console, summary_lines(summary))


def _print_lines(console: Console, lines: list[str]) -> None:
    """Wrapped between words in a terminal, not at all elsewhere."""
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=not console.is_terminal)


@contextlib.contextmanager
def _event_log() -> Iterator[EventLog]:
    """An event log that also takes what is logged by `logging`, which would otherwise end up on standard error."""
    log = EventLog()
    handler = LogToEvents(log)
    logging.getLogger().addHandler(handler)
    try:
        yield log
    finally:
        logging.getLogger().removeHandler(handler)


def _leave(peer: Peer, joining: asyncio.Task[Any], log: EventLog) -> None:
    """Stop training properly, or stop getting ready, where there is nothing to finish."""
    if peer.progress.state == "joining":
        joining.cancel()
    else:
        log.emit("leaving")
        peer.stop()


def _on_signals(first: Callable[[], object]) -> None:
    presses = 0

    def pressed() -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            Console().show_cursor()  # the panel hides it
            os._exit(130)
        first()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, pressed)


def _run(main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop where it exists. Errors for the user come out alone, not inside a group of a task's parents."""
    factory = None
    if sys.platform != "win32":
        import uvloop

        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main)
    except BaseExceptionGroup as group:
        expected, bugs = group.split(EXPECTED)
        if expected is None or bugs is not None:
            raise
        raise first_leaf(expected) from None
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
