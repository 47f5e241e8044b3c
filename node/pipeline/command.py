"""`llm-node plan`: plan a case file and show what was found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from protocol.errors import UserError

__all__ = ["plan"]

PICTURES = (".svg", ".png")


def plan(
    case: Annotated[
        Path | None, typer.Argument(help="Case file; docs/PIPELINE.md has the format.", metavar="CASE.json")
    ] = None,
    peer: Annotated[
        str | None, typer.Option("--peer", metavar="ADDRESS", help="Show the plan that this peer's swarm follows.")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            min=0.1,
            max=86_400.0,
            help="Time to search. This and what follows is for case files, --json for both.",
        ),
    ] = 30.0,
    out: Annotated[Path | None, typer.Option("--out", metavar="PLAN.json", help="Write the plan here.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--gantt", metavar="FILE", help="Draw who works when: .svg or .png.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Plan a full pipeline instead: no stage is skipped.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the search.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON instead.")] = False,
) -> None:
    """Plan a pipeline: which node holds which stage, which way every microbatch goes, and how long an iteration takes.

    A case file is planned here; with --peer, the plan that a live swarm has made for itself is shown.
    """
    if (case is None) == (peer is None):
        raise UserError("give a case file to plan, or --peer ADDRESS to see the plan of a live swarm")
    if case is None:
        assert peer is not None
        if out is not None or picture is not None or full:
            raise UserError("--out, --gantt and --full are for case files; the plan of a live swarm is only shown")
        _show_live(peer, as_json=as_json)
        return
    from node.pipeline.case import load_case
    from node.pipeline.solver import solve
    from node.pipeline.view import draw_gantt, render_solution
    from node.plotting import check_plotting

    if picture is not None:
        if picture.suffix not in PICTURES:
            raise UserError(f"--gantt {picture} must end with .svg or .png; choose another name")
        check_plotting("--gantt")
    for file in (out, picture):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"cannot write {file}: there is no such folder; make it or choose another file")
    problem = load_case(case)
    if full:
        problem = problem.full_pipeline()
    solution = solve(problem, seconds=seconds, seed=seed)
    try:
        if out is not None:
            out.write_text(json.dumps(solution.plan.to_json()) + "\n", encoding="utf-8")
        if picture is not None:
            draw_gantt(problem, solution, picture)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or 'the plan'}: {error.strerror}; choose another file") from None
    if as_json:
        facts = {"iteration_s": solution.iteration_s, "bound_s": solution.bound_s, "solver_s": solution.solver_s}
        sys.stdout.write(json.dumps({"case": problem.name, **facts, "plan": solution.plan.to_json()}) + "\n")
    else:
        Console().print(render_solution(problem, solution))


def _show_live(address: str, *, as_json: bool) -> None:
    from node.light_client import fetch_frame
    from node.pipeline.published import MAX_PLAN_BYTES, PLAN_PROTOCOL, SignedPlan
    from node.pipeline.view import render_document
    from protocol.publication import MANIFEST_PROTOCOL, SignedManifest
    from protocol.wire import MAX_HEADER_BYTES

    manifest = SignedManifest.unpack(
        fetch_frame(address, MANIFEST_PROTOCOL, what="manifest", max_bytes=MAX_HEADER_BYTES)
    ).manifest
    if manifest.pipeline.stages == 1:
        raise UserError(f"{manifest.name} has no pipeline: every peer trains the whole model")
    data = fetch_frame(address, PLAN_PROTOCOL, what="plan", max_bytes=MAX_PLAN_BYTES)
    if not data:
        raise UserError(
            f"the peers of {manifest.name} have no plan yet and route greedily; ask again after some iterations"
        )
    document = SignedPlan.unpack(data, run=manifest.run_id, spec=manifest.pipeline).document
    if as_json:
        facts = document.model_dump(exclude={"paths", "path_length"}) | {"paths": document.table()}
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        Console().print(render_document(manifest.name, document))
