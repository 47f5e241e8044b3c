"""What the owner of a node sees while it runs: a panel in a terminal, plain lines elsewhere, JSON lines on request.

In a terminal, messages scroll by above a panel that is redrawn in place, so nothing that was said is lost, and only the panel ever
cuts off a line. Names are strangers' text: they become `Text` objects, never markup, with unprintable characters replaced.
"""

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

from bootstrap.document import printable
from node.messages import ENDED_BY, Message, describe, topic
from node.peer import Peer, Summary
from node.progress import Progress
from node.quantities import count, duration, size
from protocol.ids import PeerId
from protocol.manifest import Manifest
from protocol.records import ExchangeNote

__all__ = ["BootstrapView", "JsonView", "LiveView", "PlainView", "run_lines", "summary_lines"]

REFRESH_S = 0.5
NUM_EXCHANGES = 4
OUTCOME_STYLE = {
    "averaged": "green",
    "clipped": "yellow",
    "alone": "dim",
    "refused": "red",
    "timeout": "red",
    "lost": "red",
}


def run_lines(manifest: Manifest) -> list[str]:
    """The run in three lines, in four if it has a pipeline."""
    model, sync, data = manifest.model, manifest.sync, manifest.data
    amount = f"{count(data.train_tokens)} tokens" if data.train_tokens else "each volunteer's own text"
    end = f"{sync.total_rounds} rounds" if sync.total_rounds else "no end set"
    layers = f"{model.num_layers} layer{'s' * (model.num_layers > 1)} × {model.hidden_size}"
    pipeline, pace = manifest.pipeline, f"{sync.inner_steps} steps per round of about {duration(sync.round_target_s)}"
    stages = []
    if pipeline.stages > 1:
        stages = [f"Pipeline of {pipeline.stages} stages; a peer holds one, a microbatch visits {pipeline.path_length}"]
        pace = f"{sync.inner_steps} iterations per round"
    return [
        f"Run {manifest.name}, signed by {manifest.organiser}",
        f"Model {count(model.num_parameters)} parameters, {layers}; data {data.kind}, {amount}",
        *stages,
        f"Training {sync.algorithm}, {pace}, {end}; run {manifest.run_id[:8]}",
    ]


def summary_lines(summary: Summary) -> list[str]:
    """The farewell."""
    rounds = f"{summary.rounds} round{'s' * (summary.rounds != 1)}"
    exchanges = f"{summary.exchanges_ok} exchange{'s' * (summary.exchanges_ok != 1)}, {summary.exchanges_failed} failed"
    lines = [
        f"Contributed {summary.tokens:,} tokens in {rounds}, with {exchanges}; "
        f"sent {size(summary.sent_bytes)}, received {size(summary.received_bytes)}."
    ]
    if summary.val_loss_start is not None and summary.val_loss_end is not None:
        lines.append(f"Held-out loss {summary.val_loss_start:.3f} → {summary.val_loss_end:.3f} nats per token.")
    if summary.finished and summary.stage is not None:
        lines.append(
            f"The run is complete. This home has stage {summary.stage}; the whole model is in that of the bootstrap node."
        )
    elif summary.finished:
        lines.append(
            "The run is complete. `llm-node generate` samples from the model, `llm-node export` writes it out."
        )
    else:
        lines.append("Thank you. `llm-node join` goes on from here.")
    return lines


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
        message = describe(event, fields)
        if message is not None and event != "connecting":  # says nothing yet, and an error may follow
            _print_message(self._console, message)


class LiveView:
    """Messages scrolling by, and below them a panel that is redrawn twice a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lasting: dict[str, Message] = {}
        self._saved_at_s: float | None = None

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event in ENDED_BY:
            self._lasting.pop(topic(ENDED_BY[event], fields), None)
        if event == "checkpoint_saved":
            self._saved_at_s = time.monotonic()
        message = describe(event, fields)
        if message is None or message.level == "detail":
            return
        if event in ENDED_BY.values():
            is_new = topic(event, fields) not in self._lasting
            self._lasting[topic(event, fields)] = message
            if not is_new:
                return
        _print_message(self._console, message)

    @contextlib.asynccontextmanager
    async def showing(self, peer: Peer) -> AsyncIterator[None]:
        """Draw `peer` until the block is left; the last picture stays on the screen."""
        with Live(self.draw(peer), console=self._console, auto_refresh=False) as live:
            async with asyncio.TaskGroup() as tasks:
                drawing = tasks.create_task(self._redraw(live, peer))
                try:
                    yield
                finally:
                    drawing.cancel()
            live.update(self.draw(peer, hint=""), refresh=True)

    async def _redraw(self, live: Live, peer: Peer) -> None:
        while True:
            live.update(self.draw(peer), refresh=True)
            await asyncio.sleep(REFRESH_S)

    def draw(self, peer: Peer, hint: str = "Ctrl-C leaves; joining again goes on from here") -> RenderableType:
        """The panel as of now."""
        parts: list[RenderableType] = [Text(), self._figures(peer)]
        parts += [Text(f"! {message.text}", style="yellow") for message in self._lasting.values()]
        if hint:
            parts.append(Text("Leaving" if peer.progress.state == "leaving" else hint, style="dim"))
        return Group(*parts)

    def _figures(self, peer: Peer) -> RenderableType:
        progress, traffic = peer.progress, peer.progress.traffic
        amount = f"↑ {size(traffic.sent_bytes)}  ↓ {size(traffic.received_bytes)}"
        if progress.state == "joining":
            return _rows([("joining", Text(f"fetching data and state, measuring this machine   {amount}"))])
        others = sum(record.role == "trainer" for record in peer.service.directory.peers.values())
        company = f"with {others} other peer{'s' * (others != 1)}" if others else "alone, no other peer is here"
        held_out = _loss(progress.val_loss)
        if progress.first_val_loss is not None and progress.rounds_done:
            held_out += f" (from {_loss(progress.first_val_loss)})"
        speed = [
            f"{count(progress.tokens_per_s)} tokens/s",
            f"{progress.sequences_per_step} sequences per {'step' if progress.stage is None else 'microbatch'}",
            f"{count(progress.session_tokens)} tokens contributed",
        ]
        rows: list[tuple[str, RenderableType]] = [
            ("round", _round(progress, peer.manifest.sync.total_rounds, self._console.width)),
            ("loss", Text(f"{_loss(progress.train_loss)} training · {held_out} held-out")),
            ("speed", Text(" · ".join(speed))),
            ("swarm", Text(f"{company} · {amount}")),
            ("saved", Text(_ago(self._saved_at_s))),
        ]
        if progress.stage is not None:
            stage = (
                f"{progress.stage} of {peer.manifest.pipeline.stages}, counted from 0 · iteration {progress.iteration}"
            )
            rows.insert(0, ("stage", Text(stage)))
        totals = f"{progress.exchanges_ok} averaged, {progress.exchanges_failed} failed"
        return Group(_rows([*rows, ("exchanges", Text(totals))]), _exchanges(peer))


class BootstrapView:
    """For a bootstrap node: where to join, where the page is, warnings, and how the swarm does.

    A context manager: in a terminal the last of these is one line that is redrawn in place.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> BootstrapView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        message = describe(event, fields)
        if event == "serving":
            self._say(f"Run {fields['name']} ({fields['run'][:12]}) is published. Others join with")
            for address in fields["addresses"]:
                self._say(f"  llm-node join --peer {address}")
            self._say("Ctrl-C stops this node; those who train go on without it.")
        elif event == "swarm" and message is not None and self._live is not None:
            self._live.update(Text(message.text, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif event == "web_page":
            self._say(f"Status page {fields['url']}")
        elif message is not None and event not in ("alone", "company"):  # a bootstrap node may well be alone
            _print_message(self._console, message)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_message(console: Console, message: Message) -> None:
    """Beside the time; in a terminal, wrapped between words and indented."""
    text, style = message.text, ""
    if message.level == "warning":
        text, style = f"warning: {text}", "yellow"
    clock = Text(time.strftime("%H:%M:%S"), style="dim")
    if console.is_terminal:
        line = Table.grid(padding=(0, 1))
        line.add_column()
        line.add_column(overflow="fold")
        line.add_row(clock, Text(text, style=style))
        console.print(line)
    else:
        console.print(Text.assemble(clock, " ", text), soft_wrap=True)


def _rows(rows: list[tuple[str, RenderableType]]) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="dim", width=9, no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for label, value in rows:
        table.add_row(label, value)
    return table


def _round(progress: Progress, total_rounds: int, width: int) -> RenderableType:
    step = min(progress.step, progress.inner_steps)
    number = f"{progress.round} of {total_rounds}" if total_rounds else str(progress.round)
    left = "" if progress.eta_s is None else f" · {duration(progress.eta_s)} left"
    bar = ProgressBar(total=progress.inner_steps, completed=step, width=max(8, min(40, width - 52)))
    line = Table.grid(padding=(0, 2))
    line.add_row(number, bar, Text(f"{step}/{progress.inner_steps} steps{left}", no_wrap=True))
    return line


def _exchanges(peer: Peer) -> RenderableType:
    """The last exchanges, newest first; always the same height, so that the panel does not jump."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=9)
    for _ in range(4):
        table.add_column(no_wrap=True, overflow="ellipsis")
    notes = list(peer.progress.recent)[-NUM_EXCHANGES:]
    for note in reversed(notes):
        took = "" if note.partner is None else f"{note.seconds:.1f} s"
        outcome = Text(note.outcome, style=OUTCOME_STYLE[note.outcome])
        table.add_row("", Text(f"round {note.round}", style="dim"), outcome, _partner(peer, note), took)
    for _ in range(NUM_EXCHANGES - len(notes)):
        table.add_row("")
    return table


def _partner(peer: Peer, note: ExchangeNote) -> Text:
    if note.partner is None:
        return Text("no partner was free" if note.outcome == "alone" else "", style="dim")
    record = peer.service.directory.all_records.get(PeerId(note.partner))
    name = "" if record is None else printable(record.name).strip()
    return Text.assemble("with ", f"{name} " if name else "", (f"…{note.partner[-8:]}", "dim"))


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"


def _ago(moment_s: float | None) -> str:
    return "not yet" if moment_s is None else f"{duration(time.monotonic() - moment_s)} ago"
