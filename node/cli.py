"""The command line. Commands only read options, call one function elsewhere, and show its result.

Heavy modules are imported inside the commands: `llm-node status` must start in under two seconds, and it may not even import
torch or hivemind, because its py-libp2p cannot live in one process with hivemind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from node.command_options import (
    AnnounceOption,
    EventsOption,
    HomeOption,
    HttpOption,
    ListenOption,
    NameOption,
    host_port,
    listen_addresses,
    peer_addresses,
    say,
    setting,
)
from node.identity_command import identity_app
from node.init_command import init
from node.model_commands import export, generate
from node.pipeline.command import plan
from protocol.errors import UserError
from protocol.manifest import describe_fields

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train one language model together with strangers: peer to peer, no central trainer.",
)
app.add_typer(identity_app, name="identity")


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from node.progress import software_version

        say(f"llm-node {software_version()}")
        raise typer.Exit


@app.callback()
def options_of_all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What comes before the command; the help of the whole program is above."""


app.command(epilog=describe_fields())(init)


@app.command()
def bootstrap(
    manifest: Annotated[Path, typer.Argument(help="Manifest made by `llm-node init`.")],
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    peer: Annotated[list[str] | None, typer.Option("--peer", help="Another bootstrap node of the same run.")] = None,
    http: HttpOption = None,
    name: NameOption = "bootstrap",
    events: EventsOption = False,
    home: HomeOption = None,
) -> None:
    """Publish a run: first address, seed of the data, collector of status records, status page.

    In a run of several stages it also collects the newest state of each, so that its home has the whole model.
    """
    addresses = {"listen": listen_addresses(listen, default="/ip4/0.0.0.0/tcp/4001"), "peers": peer_addresses(peer)}
    page = host_port(http)
    from node import terminal
    from node.coordinator import CoordinatorOptions
    from node.home import Home

    options = CoordinatorOptions(
        **addresses,
        announce=tuple(announce or []),
        http=page,
        name=name,
    )
    terminal.run_bootstrap(Home.at(home), manifest, options, as_json=events)


@app.command()
def join(
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Address of any node of the run; may be repeated. Not needed to go on."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of your own text, for a run that asks for it.")
    ] = None,
    name: NameOption = "",
    http: HttpOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="Processor threads to train with; 0 takes what is fastest.")
    ] = 0,
    memory: Annotated[
        float,
        typer.Option(
            "--memory",
            min=0.0,
            help="GiB of memory that training may take, the whole model or one of its stages; 0 for what is free.",
        ),
    ] = 0.0,
    sequences: Annotated[
        int,
        typer.Option(
            "--sequences",
            min=0,
            help="Sequences per step; 0 measures the machine and adapts. Without effect where the model is in stages.",
        ),
    ] = 0,
    rounds: Annotated[int, typer.Option("--rounds", min=0, help="Leave after so many rounds; 0 stays.")] = 0,
    device: Annotated[str, typer.Option("--device", help="torch device; only cpu has been tested so far.")] = "cpu",
    events: EventsOption = False,
    home: HomeOption = None,
) -> None:
    """Take part in a run. Ctrl-C leaves it; joining again goes on where you left.

    Where the model is split into stages, you hold one: that which the swarm lacks most. When another one needs you more, you move.
    """
    addresses = {"listen": listen_addresses(listen, default="/ip4/0.0.0.0/tcp/0"), "peers": peer_addresses(peer)}
    page = host_port(http)
    from node import terminal
    from node.home import Home
    from node.join import JoinOptions
    from node.peer import PeerOptions

    network = JoinOptions(**addresses, announce=tuple(announce or []))
    options = PeerOptions(
        name=name,
        http=page,
        local_data=data,
        sequences=sequences,
        threads=threads,
        max_rounds=rounds,
        device=device,
        memory_bytes=int(memory * 2**30),
    )
    terminal.run_join(Home.at(home), network, options, as_json=events)


@app.command()
def status(
    peer: Annotated[str, typer.Option("--peer", help="Address of any node of the run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole status document.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for an answer.")] = 10.0,
) -> None:
    """Show how a swarm is doing, asking any one of its nodes."""
    from node.status import fetch_status
    from node.status_view import render_status

    document = fetch_status(peer, timeout_s=timeout_s)
    if as_json:
        say(json.dumps(document))
    else:
        Console().print(render_status(document))


app.command()(generate)
app.command()(export)
app.command()(plan)


@app.command()
def demo(
    peers: Annotated[int, typer.Option("--peers", min=1, max=64, help="Number of training peers.")] = 3,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds to train.")] = 18,
    transport: Annotated[
        str, typer.Option("--transport", help="libp2p: separate processes; memory: one process in virtual time.")
    ] = "libp2p",
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the weights, and with memory of the peers' identities.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    folder: Annotated[Path, typer.Option("--dir", help="Folder for the demo's files; emptied first.")] = Path(
        "demo-run"
    ),
) -> None:
    """Watch a whole swarm on this machine: one bootstrap node and a few peers train a small model."""
    from node.demo import run_demo
    from node.demo_settings import DemoOptions

    if transport not in ("libp2p", "memory"):
        raise UserError(f"no transport {transport!r}; choose libp2p or memory")
    result = run_demo(DemoOptions(peers=peers, rounds=rounds, seed=seed, folder=folder, memory=transport == "memory"))
    if as_json:
        say(json.dumps(result))


@app.command()
def simulate(
    scenario: Annotated[Path, typer.Argument(help="Scenario file; examples are in docs/scenarios.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.FIELD=VALUE", help="Change the scenario: swarm.peers=200; may be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for result.json and plots (PNG and SVG); made if missing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON instead.")] = False,
) -> None:
    """Try a swarm of up to thousands of peers in one process, in virtual time: the real averaging on a toy problem, and the real
    pipelines where the scenario splits the model into stages."""
    from node.simulation.run import simulate_file
    from node.simulation.scenario import load_scenario
    from node.simulation.view import render_simulation

    changed = load_scenario(scenario, dict(setting(text) for text in settings or []))
    result = simulate_file(changed, scenario.parent, out=out)
    if as_json:
        say(json.dumps(result))
    else:
        Console().print(render_simulation(result))
