"""`llm-node init`: make a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from node.command_options import HomeOption, say, setting
from protocol.errors import UserError

__all__ = ["init"]


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
