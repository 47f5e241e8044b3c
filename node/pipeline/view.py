"""A plan as tables for people and as a picture: who works when.

The picture needs matplotlib, which comes with the extra `simulate`; the tables need nothing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from node.pipeline.case import Case
from node.pipeline.published import PlanDocument
from node.pipeline.replay import BACKWARD, FORWARD, LOSS
from node.pipeline.solver import Solution
from node.quantities import count

__all__ = ["draw_gantt", "render_document", "render_solution"]

MAX_NODES_SHOWN = 40
_COLOURS = {FORWARD: "#4c78a8", LOSS: "#e0a030", BACKWARD: "#72b79c"}
_NAMES = {FORWARD: "forward", LOSS: "loss", BACKWARD: "backward"}


def render_solution(case: Case, solution: Solution) -> RenderableType:
    """What the planner found, and how busy each node is."""
    plan = solution.plan
    title = (
        f"{case.name}: {len(plan.microbatches)} microbatches over {case.path_length} of {case.num_stages} stages, "
        f"{case.num_nodes} nodes"
    )
    facts = Table.grid(padding=(0, 2))
    for label, value in (
        ("iteration", f"{solution.iteration_s:.2f} s"),
        ("bound with this partition", f"{solution.bound_s:.2f} s"),
        ("gap", f"at most {100 * solution.gap:.1f} %"),
        ("search", f"{solution.solver_s:.1f} s, {count(solution.num_evaluations)} iterations simulated"),
    ):
        facts.add_row(Text(label, style="dim"), value)
    return Group(Text(title, style="bold"), facts, _nodes(case, solution))


def render_document(name: str, document: PlanDocument) -> RenderableType:
    """A live swarm's plan: how long it expects an iteration to take, and how often it visits each peer."""
    table = document.table()
    visits = Counter(place for path in table for place in path)
    title = f"{name}: {len(table)} microbatches over {document.path_length} stages, {len(document.members)} peers"
    facts = Table.grid(padding=(0, 2))
    for label, value in (
        ("plan", str(document.number)),
        ("made by", f"…{document.planner[-8:]}"),
        ("expected iteration", f"{document.iteration_s:.2f} s"),
    ):
        facts.add_row(Text(label, style="dim"), value)
    rows = Table("stage", "peer", "visits", "")
    most = max(visits.values(), default=1)
    places = sorted(range(len(document.members)), key=lambda place: (document.stages[place], document.members[place]))
    for place in places[:MAX_NODES_SHOWN]:
        bar = "█" * round(20 * visits[place] / most)
        rows.add_row(str(document.stages[place]), f"…{document.members[place][-8:]}", str(visits[place]), bar)
    if len(places) > MAX_NODES_SHOWN:
        rows.caption = f"and {len(places) - MAX_NODES_SHOWN} peers more"
    return Group(Text(title, style="bold"), facts, rows)


def _nodes(case: Case, solution: Solution) -> Table:
    table = Table("stage", "node", "visits", "busy", "")
    utilisation = solution.utilisation(case)
    visits = [0] * case.num_nodes
    for microbatch in solution.plan.microbatches:
        for node in microbatch.path:
            visits[node] += 1
    rows = [(stage, node) for stage, nodes in enumerate(solution.plan.partition) for node in nodes]
    for stage, node in rows[:MAX_NODES_SHOWN]:
        share = utilisation[node]
        table.add_row(str(stage), str(node), str(visits[node]), f"{100 * share:.0f} %", "█" * round(20 * share))
    if len(rows) > MAX_NODES_SHOWN:
        table.caption = f"and {len(rows) - MAX_NODES_SHOWN} nodes more"
    return table


def draw_gantt(case: Case, solution: Solution, path: Path) -> None:
    """One row per node, one bar per task, with the microbatch's number in it.

    Args:
        path: file to write; .svg or .png.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [node for stage in solution.plan.partition for node in stage]
    row_of = {node: row for row, node in enumerate(rows)}
    figure = Figure(figsize=(12.0, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for task in solution.timeline:
        row, width = row_of[task.node], task.end_s - task.start_s
        axes.barh(
            row, width, left=task.start_s, height=0.84, color=_COLOURS[task.kind], edgecolor="white", linewidth=0.5
        )
        if task.kind != LOSS:
            middle = task.start_s + width / 2
            axes.text(middle, row, str(task.microbatch), ha="center", va="center", fontsize=6, color="white")
    stage_of = {node: stage for stage, nodes in enumerate(solution.plan.partition) for node in nodes}
    axes.set_yticks(range(len(rows)), [f"stage {stage_of[node]} · node {node}" for node in rows], fontsize=7)
    for row in range(1, len(rows)):
        if stage_of[rows[row]] != stage_of[rows[row - 1]]:
            axes.axhline(row - 0.5, color="#999999", linewidth=0.8)
    axes.set_xlim(0.0, solution.iteration_s * 1.005)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(title=f"{case.name}: {solution.iteration_s:.2f} s per iteration", xlabel="seconds")
    legend = [Patch(color=_COLOURS[kind], label=_NAMES[kind]) for kind in _COLOURS]
    figure.legend(handles=legend, loc="outside lower center", ncols=3)
    with rc_context({"svg.hashsalt": "llm-node"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
