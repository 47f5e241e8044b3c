"""A simulation's result as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from node.quantities import count, duration, size
from node.simulation.staged_view import render_staged

__all__ = ["render_simulation"]

MAX_ROUNDS_SHOWN = 12


def render_simulation(result: dict[str, Any]) -> RenderableType:
    """Draw what `node.simulation.run.simulate` returns."""
    if "stages" in result:
        return render_staged(result)
    title = (
        f"{result['name']}: {result['peers']} peers, {result['rounds']} rounds of {result['algorithm']}, "
        f"{duration(result['virtual_s'])} of virtual time"
    )
    return Group(Text(title, style="bold"), _times(result), _network(result), _by_round(result["by_round"]))


def _times(result: dict[str, Any]) -> Table:
    table = Table("", "mean", "p50", "p95", "max")
    for label, key in (("round", "round_s"), ("exchange", "exchange_s")):
        if result[key]:
            table.add_row(label, *(f"{result[key][name]:.2f} s" for name in ("mean", "p50", "p95", "max")))
    return table


def _network(result: dict[str, Any]) -> Table:
    each = result["per_peer_and_round"]
    rows = [
        ("exchanges that averaged", f"{100 * result['success_share']:.1f} %"),
        ("how they ended", ", ".join(f"{number} {kind}" for kind, number in result["exchanges"].items()) or "none"),
        ("bytes sent per peer and round", size(round(each["sent_bytes"]))),
        ("messages per peer and round", f"{each['messages']:.1f} on {each['streams']:.1f} streams"),
        ("pairs tried per peer and round", f"{each['pairs_tried']:.1f}"),
        (
            "look-ups per peer and round",
            f"{each['dht_gets']:.1f} reads, {each['dht_stores']:.1f} stores, {each['dht_hops']:.1f} hops",
        ),
        ("peer rounds", count(result["peer_rounds"])),
    ]
    changes = ", ".join(f"{number} {kind}" for kind, number in result["population"].items() if number)
    table = Table.grid(padding=(0, 2))
    for label, value in [*rows, ("peers and rounds", changes or "nobody came, went or skipped")]:
        table.add_row(Text(label, style="dim"), value)
    return table


def _by_round(columns: dict[str, list[float]]) -> Table:
    table = Table("after round", "replica spread", "loss of a replica", "loss of their mean")
    numbers = list(range(len(columns["round"])))
    if len(numbers) > MAX_ROUNDS_SHOWN:
        step = (len(numbers) - 1) / (MAX_ROUNDS_SHOWN - 1)
        numbers = sorted({round(index * step) for index in range(MAX_ROUNDS_SHOWN)})
    for number in numbers:
        values = [f"{columns[name][number]:.4f}" for name in ("spread", "replica_loss", "mean_loss")]
        table.add_row(str(columns["round"][number]), *values)
    return table
