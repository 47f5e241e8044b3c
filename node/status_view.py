"""A status document as a terminal shows it: for `llm-node status`. Needs rich and the document's module only.

Names in the document are strangers' text. The schema has replaced control characters; here they become `Text` objects and
never markup, so that a name in square brackets stays a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bootstrap.document import display_name
from node.quantities import count, size

__all__ = ["render_status"]

_MAX_ROWS = 20
_NAME_CHARS = 18
_STATE_STYLES = {"training": "green", "joining": "yellow", "serving": "cyan", "leaving": "dim", "silent": "red"}
_OUTCOME_STYLES = {"averaged": "green", "clipped": "yellow", "timeout": "yellow", "refused": "red", "lost": "red"}
_COLUMNS = ("round", "step", "tokens/s", "train", "val", "sent", "received")


def render_status(document: Mapping[str, Any]) -> RenderableType:
    """Lay out a checked status document (see `bootstrap.document.StatusDocument`) for a terminal.

    Returns:
        The run in one line, the swarm in another, warnings, a table of peers, and the last exchanges.
    """
    swarm, peers, exchanges = document["swarm"], document["peers"], document["exchanges"]
    parts: list[RenderableType] = [_run_line(document["run"]), _swarm_line(swarm, document["run"])]
    if document["stages"]:
        parts.append(_stage_line(document["stages"]))
    parts += [Text(f"! {warning}", style="yellow") for warning in document["warnings"]]
    parts += [Text(), _peer_table(peers) if peers else Text("no peers yet", style="dim")]
    if len(peers) > _MAX_ROWS:
        parts.append(Text(f"and {len(peers) - _MAX_ROWS} more peers", style="dim"))
    parts += [Text(), Text("last exchanges", style="bold")]
    parts.append(_exchange_table(exchanges[:5]) if exchanges else Text("none yet", style="dim"))
    return Group(*parts)


def _run_line(run: Mapping[str, Any]) -> Text:
    about = f"  {count(run['parameters'])} parameters · {run['algorithm']} · {run['inner_steps']} steps per round"
    return Text.assemble((run["name"], "bold"), about, (f"  run {run['id'][:12]}…", "dim"))


def _swarm_line(swarm: Mapping[str, Any], run: Mapping[str, Any]) -> Text:
    rounds = f"round {swarm['round']}" + (f" of {run['total_rounds']}" if run["total_rounds"] else "")
    val = "validation loss not measured yet"
    if swarm["val_loss"] is not None:
        val = f"validation loss {swarm['val_loss']:.3f} (round {swarm['val_round']})"
    parts = [
        val,
        rounds,
        f"{swarm['training']} of {swarm['peers']} peers training",
        f"{count(swarm['tokens_per_s'])} tokens/s",
        f"{count(swarm['tokens'])} tokens",
        f"{count(swarm['exchanges_ok'])} exchanges, {count(swarm['exchanges_failed'])} failed",
    ]
    return Text(" · ".join(parts))


def _stage_line(stages: list[Mapping[str, Any]]) -> Text:
    """How many peers hold each stage of the pipeline."""
    line = Text("peers per stage  ")
    for stage in stages:
        line.append(f"{stage['stage']}: ", style="dim")
        line.append(f"{stage['peers']}  ", style="" if stage["peers"] else "red")
    return line


def _peer_table(peers: list[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("peer", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for peer in peers[:_MAX_ROWS]:
        table.add_row(*_peer_row(peer))
    return table


def _peer_row(peer: Mapping[str, Any]) -> list[Text]:
    name = Text(display_name(peer["name"], peer["peer"]))
    name.truncate(_NAME_CHARS, overflow="ellipsis")
    if peer["stage"] is not None:
        name.append(f" stage {peer['stage']}", style="dim")
    state = Text(peer["state"], style=_STATE_STYLES[peer["state"]])
    if peer["state"] == "silent":
        state.append(f" {peer['age_s']:.0f} s")
    numbers = ["–", "–", "–"]
    if peer["role"] == "trainer":
        numbers = [str(peer["round"]), f"{peer['step']}/{peer['inner_steps']}", count(peer["tokens_per_s"])]
    numbers += [_loss(peer["train_loss"]), _loss(peer["val_loss"])]
    numbers += [size(peer["sent_bytes"]), size(peer["received_bytes"])]
    return [name, state, *map(Text, numbers)]


def _exchange_table(exchanges: list[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for item in exchanges:
        pair = item["name"] if item["partner"] is None else f"{item['name']} with {item['partner_name']}"
        outcome = Text(item["outcome"], style=_OUTCOME_STYLES.get(item["outcome"], ""))
        took = "" if item["partner"] is None else f"{item['seconds']:.1f} s"
        table.add_row(Text(f"round {item['round']}", style="dim"), Text(pair), outcome, Text(took, style="dim"))
    return table


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"
