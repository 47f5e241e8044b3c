"""`llm-node identity`: show, back up and restore this peer's key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from node.command_options import HomeOption, say

__all__ = ["identity_app"]

identity_app = typer.Typer(no_args_is_help=True, help="Show, back up or restore this peer's key.")


@identity_app.command("show")
def identity_show(home: HomeOption = None) -> None:
    """Print this peer's id, making a key if there is none."""
    from node.home import Home
    from protocol.identity import Identity

    say(Identity.load_or_create(Home.at(home).identity).peer_id)


@identity_app.command("backup")
def identity_backup(
    target: Annotated[Path, typer.Argument(help="File to write; keep it secret.")], home: HomeOption = None
) -> None:
    """Copy the key to a file."""
    from node.home import Home
    from protocol.identity import backup

    backup(Home.at(home).identity, target)
    say(f"Wrote {target}. Whoever has it can speak for this peer.")


@identity_app.command("restore")
def identity_restore(
    source: Annotated[Path, typer.Argument(help="File made by `identity backup`.")], home: HomeOption = None
) -> None:
    """Use a key from a file; refuses to replace an existing one."""
    from node.home import Home
    from protocol.identity import Identity, restore

    place = Home.at(home)
    restore(source, place.identity)
    say(f"This peer is now {Identity.load(place.identity).peer_id}.")
