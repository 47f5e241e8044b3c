"""The command line. Commands only read options, call one function elsewhere, and show its result.

Heavy modules are imported inside the commands: `llm-node status` must start in under two seconds, and it may not even import
torch or hivemind, because its py-libp2p cannot live in one process with hivemind.
"""

from __future__ import annotations

import json
import sys
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
    RunOption,
    host_port,
    numbers,
    say,
    setting,
)
from node.identity_command import identity_app
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


@app.command(epilog=describe_fields())
def init(
    manifest: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.toml"),
    name: Annotated[str, typer.Option("--name", help="Name of the run.")] = "my-run",
    model: Annotated[
        str, typer.Option("--model", help="Preset: 1m, 3m, 10m, 25m, 50m, 100m, 300m, 1b, 3b or 8b.")
    ] = "10m",
    data: Annotated[
        str,
        typer.Option(
            "--data", help="A folder of text, `stdlib` (Python's own sources) or `local` (volunteers' files)."
        ),
    ] = "stdlib",
    heldout: Annotated[
        Path | None, typer.Option("--heldout", help="Folder of held-out text; only with --data local.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the initial weights.")] = 0,
    stages: Annotated[
        int,
        typer.Option(
            "--stages",
            min=1,
            help="Split the model into so many stages; each peer holds one. For models larger than a peer.",
        ),
    ] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Set a field below; may be repeated."),
    ] = None,
    max_chars: Annotated[
        int, typer.Option("--max-chars", help="Use at most so many characters of text; 0 for all.")
    ] = 0,
    heldout_tokens: Annotated[int, typer.Option("--heldout-tokens", help="Size of the held-out set.")] = 1 << 15,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
    home: HomeOption = None,
) -> None:
    """Make a run: train a tokenizer, cut the text into shards, and write the manifest that describes everything."""
    from node.home import Home
    from node.publish import RunRequest, make_run
    from protocol.blobs import BlobStore
    from protocol.identity import Identity

    place = Home.at(home)
    if manifest.exists() and not force:
        raise UserError(f"{manifest} exists already; choose another file or add --force")
    if not manifest.absolute().parent.is_dir():
        raise UserError(f"cannot write {manifest}: there is no such folder; make it or choose another file")
    request = RunRequest(
        name=name,
        organiser=Identity.load_or_create(place.identity).peer_id,
        model=model,
        data=data,
        heldout=heldout,
        heldout_tokens=heldout_tokens,
        seed=seed,
        max_chars=max_chars,
        overrides={"pipeline.stages": stages} | dict(setting(text) for text in settings or []),
    )
    made = make_run(request, BlobStore(place.blobs))
    try:
        manifest.write_text(made.to_toml(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {manifest}: {error.strerror}; choose another file") from None
    from node.view import run_lines

    say(*run_lines(made), f"Wrote {manifest}. Next: llm-node bootstrap {manifest} --http 127.0.0.1:8080")


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
    from node import terminal
    from node.coordinator import CoordinatorOptions
    from node.home import Home

    options = CoordinatorOptions(
        listen=tuple(listen or ["/ip4/0.0.0.0/tcp/4001"]),
        announce=tuple(announce or []),
        peers=tuple(peer or []),
        http=host_port(http),
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
    from node import terminal
    from node.home import Home
    from node.join import JoinOptions
    from node.peer import PeerOptions

    network = JoinOptions(
        peers=tuple(peer or []), listen=tuple(listen or ["/ip4/0.0.0.0/tcp/0"]), announce=tuple(announce or [])
    )
    options = PeerOptions(
        name=name,
        http=host_port(http),
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


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "",
    run: RunOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Length of the sample.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.01, max=1.0, help="Sample from this share of probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sample.")] = 0,
    skip_stages: Annotated[
        str,
        typer.Option("--skip-stages", metavar="2,3", help="Leave out these stages; they count from 0, which stays."),
    ] = "",
    home: HomeOption = None,
) -> None:
    """Continue a text with the model trained so far.

    A model in stages is whole in the home of its bootstrap node only.
    """
    from node.artifacts import load_trained
    from node.home import Home

    skipped = numbers(skip_stages, "--skip-stages")
    trained = load_trained(Home.at(home), run)
    trained.omit_stages(skipped)
    sys.stdout.write(prompt)
    for piece in trained.sample(prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write; made if missing.")],
    run: RunOption = None,
    home: HomeOption = None,
) -> None:
    """Write the trained model as a folder that Hugging Face transformers loads.

    A model in stages is whole in the home of its bootstrap node only.
    """
    from node.artifacts import load_trained
    from node.home import Home

    trained = load_trained(Home.at(home), run)
    trained.export(folder)
    say(
        f"Wrote {folder}: {trained.manifest.name} after round {trained.round}, for AutoModelForCausalLM.from_pretrained."
    )


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
