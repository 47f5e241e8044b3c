"""What the owner of a peer sees while it runs: one screen in a terminal, plain lines elsewhere, JSON lines on request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from node.events import Listener
from node.peer import Peer, Summary
from protocol.manifest import Manifest

__all__ = ["JsonView", "LiveView", "PlainView", "run_lines", "show_bootstrap", "summary_lines"]

REFRESH_S = 0.5
QUIET_EVENTS = {"step"}
OUTCOME_STYLE = {
    "averaged": "green",
    "clipped": "yellow",
    "alone": "dim",
    "refused": "red",
    "timeout": "red",
    "lost": "red",
}


def run_lines(manifest: Manifest) -> list[str]:
    """The run in three lines."""
    model, sync, data = manifest.model, manifest.sync, manifest.data
    amount = f"{data.train_tokens / 1e6:.1f}M tokens" if data.train_tokens else "each volunteer's own text"
    end = f"{sync.total_rounds} rounds" if sync.total_rounds else "no end set"
    return [
        f"Run {manifest.name} ({manifest.run_id[:12]}), signed by {manifest.organiser}",
        f"Model {model.num_parameters / 1e6:.1f}M parameters, {model.num_layers} layers × {model.hidden_size}; "
        f"data {data.kind}, {amount}",
        f"Training {sync.algorithm}, {sync.inner_steps} steps per round of about {sync.round_target_s:g} s, {end}",
    ]


def summary_lines(summary: Summary) -> list[str]:
    """The farewell."""
    lines = [
        f"Contributed {summary.tokens:,} tokens in {summary.rounds} rounds; {summary.exchanges_ok} exchanges, "
        f"{summary.exchanges_failed} failed."
    ]
    if summary.val_loss_start is not None and summary.val_loss_end is not None:
        lines.append(f"Held-out loss {summary.val_loss_start:.3f} → {summary.val_loss_end:.3f} nats per token.")
    lines.append(f"Sent {summary.sent_bytes / 1e6:.1f} MB, received {summary.received_bytes / 1e6:.1f} MB.")
    return lines


def show_bootstrap(console: Console) -> Listener:
    """For a bootstrap node: where to join and where the page is; everything else stays in the event log."""

    def show(event: str, fields: dict[str, Any]) -> None:
        if event == "serving":
            console.print(
                f"Run {fields['name']} ({fields['run'][:12]}) is published. Others join with", highlight=False
            )
            for address in fields["addresses"]:
                console.print(f"  llm-node join --peer {address}", highlight=False, soft_wrap=True)
            console.print("Ctrl-C stops this node; those who train go on without it.", highlight=False)
        elif event == "web_page":
            console.print(f"Status page {fields['url']}", highlight=False)

    return show


class JsonView:
    """Every event as one JSON line on standard output; for programs that watch a node."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, default=str)
        self._console.file.write(line + "\n")
        self._console.file.flush()


class PlainView:
    """One line per event that a person cares about; where output is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event not in QUIET_EVENTS:
            details = " ".join(f"{key}={value}" for key, value in fields.items() if value is not None)
            self._console.print(
                f"{time.strftime('%H:%M:%S')} {event} {details}", markup=False, highlight=False, soft_wrap=True
            )


class LiveView:
    """One screen, redrawn twice a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = Text("starting", style="dim")

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event not in ("step", "validation", "exchange"):
            details = " ".join(f"{key}={value}" for key, value in fields.items() if value is not None)
            self._last = Text(
                f"{time.strftime('%H:%M:%S')} {event} {details}", style="dim", overflow="ellipsis", no_wrap=True
            )

    @contextlib.asynccontextmanager
    async def showing(self, peer: Peer) -> AsyncIterator[None]:
        """Draw `peer` until the block is left; the last picture stays on the screen."""
        with Live(self._draw(peer), console=self._console, auto_refresh=False) as live:
            async with asyncio.TaskGroup() as tasks:
                drawing = tasks.create_task(self._redraw(live, peer))
                try:
                    yield
                finally:
                    drawing.cancel()
            live.update(self._draw(peer), refresh=True)

    async def _redraw(self, live: Live, peer: Peer) -> None:
        while True:
            live.update(self._draw(peer), refresh=True)
            await asyncio.sleep(REFRESH_S)

    def _draw(self, peer: Peer) -> RenderableType:
        return Group(*map(Text, run_lines(peer.manifest)), Text(), _figures(peer), Text(), _exchanges(peer), self._last)


def _figures(peer: Peer) -> Table:
    progress = peer.progress
    table = Table.grid(padding=(0, 3))
    done = ProgressBar(total=progress.inner_steps, completed=min(progress.step, progress.inner_steps), width=24)
    eta = "" if progress.eta_s is None else f"{max(progress.eta_s, 0.0):.0f} s left"
    table.add_row("round", str(progress.round), done, f"step {progress.step}/{progress.inner_steps}  {eta}")
    table.add_row("loss", _number(progress.train_loss), "held-out", _number(progress.val_loss))
    speed = f"{progress.tokens_per_s:,.0f} tokens/s"
    table.add_row("speed", speed, "batch", f"{progress.sequences_per_step} sequences")
    traffic = f"↑ {progress.traffic.sent_bytes / 1e6:.1f} MB  ↓ {progress.traffic.received_bytes / 1e6:.1f} MB"
    others = sum(record.role == "trainer" for record in peer.service.directory.peers.values())
    table.add_row("traffic", traffic, "peers", f"{others} others, {progress.state}")
    return table


def _exchanges(peer: Peer) -> RenderableType:
    notes = list(peer.progress.recent)
    if not notes:
        return Text("no exchange yet", style="dim")
    table = Table.grid(padding=(0, 2))
    for note in reversed(notes):
        partner = f"with …{note.partner[-6:]}" if note.partner else ""
        style = OUTCOME_STYLE[note.outcome]
        table.add_row(f"round {note.round}", Text(note.outcome, style=style), partner, f"{note.seconds:.2f} s")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
