"""The result of a simulated pipeline as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from node.quantities import count, duration, size

__all__ = ["render_staged"]

MAX_ITERATIONS_SHOWN = 12


def render_staged(result: dict[str, Any]) -> RenderableType:
    """Draw what `node.simulation.run.simulate` returns for a scenario with stages."""
    title = (
        f"{result['name']}: {result['peers']} peers, {result['path_length']} of {result['stages']} stages per microbatch, "
        f"{result['iterations']} iterations, {duration(result['virtual_s'])} of virtual time"
    )
    parts: list[RenderableType] = [Text(title, style="bold"), _facts(result), _by_stage(result["by_stage"])]
    if result["by_iteration"]["iteration"]:
        parts.append(_by_iteration(result["by_iteration"]))
    return Group(*parts)


def _facts(result: dict[str, Any]) -> Table:
    fates, each = result["microbatches"], result["per_peer_and_iteration"]
    times = ", ".join(f"{name} {value:.1f} s" for name, value in result["iteration_s"].items() if name != "p95")
    known = result["known_peers"]
    rows = [
        ("iteration", times or "none was finished"),
        ("microbatches", ", ".join(f"{number} {kind}" for kind, number in fates.items())),
        ("stages visited by those", f"{result['visits_per_microbatch']:.2f}"),
        ("tokens per virtual second", count(round(result["tokens_per_s"]))),
        ("tasks not taken", _counts(result["failures"])),
        (
            "iterations ended by the deadline",
            f"{result['overdue']} of {result['peer_iterations']}, each peer's counted",
        ),
        ("a peer knows", f"{known['mean']:.1f} peers on average, itself included" if known else ""),
        ("bytes sent per peer and iteration", size(round(each.get("sent_bytes", 0)))),
        ("exchanges with replicas", _counts(result["exchanges"])),
        ("spread of replicas by round", ", ".join(f"{spread:.3f}" for spread in result["by_round"]["spread"][-6:])),
        ("peers", _counts(result["population"]) if result["population"] else "nobody came or went"),
    ]
    if not result["finished"]:
        rows.insert(0, ("unfinished", "too few peers or stages were left to go on"))
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        table.add_row(Text(label, style="dim"), value)
    return table


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in numbers.items() if number) or "none"


def _by_stage(columns: dict[str, list[float]]) -> Table:
    table = Table("stage", "peers (mean)", "least", "visits", "busy", "")
    for stage, peers, least, visits, share in zip(
        *(columns[name] for name in ("stage", "mean_peers", "least_peers", "visits", "utilisation")), strict=True
    ):
        table.add_row(
            f"{stage}", f"{peers:.1f}", f"{least}", count(int(visits)), f"{100 * share:.0f} %", "█" * round(20 * share)
        )
    return table


def _by_iteration(columns: dict[str, list[Any]]) -> Table:
    table = Table("iteration", "median", "returned", "lost", "rerouted", "peers per stage")
    numbers = list(range(len(columns["iteration"])))
    if len(numbers) > MAX_ITERATIONS_SHOWN:
        step = (len(numbers) - 1) / (MAX_ITERATIONS_SHOWN - 1)
        numbers = sorted({round(index * step) for index in range(MAX_ITERATIONS_SHOWN)})
    for number in numbers:
        table.add_row(
            str(columns["iteration"][number]),
            f"{columns['median_s'][number]:.1f} s",
            *(str(columns[kind][number]) for kind in ("returned", "lost", "rerouted")),
            " ".join(map(str, columns["peers"][number])),
        )
    return table
