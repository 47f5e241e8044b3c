"""What the commands share: options that several of them have, how the values of options are read, and printing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from protocol.errors import UserError
from protocol.libp2p_addresses import check_port_is_free, split_address

__all__ = [
    "AnnounceOption",
    "EventsOption",
    "HomeOption",
    "HttpOption",
    "ListenOption",
    "NameOption",
    "RunOption",
    "host_port",
    "listen_addresses",
    "numbers",
    "peer_addresses",
    "say",
    "setting",
]

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="Folder of this node's key, data and checkpoints [default: ~/.llm-node]")
]
ListenOption = Annotated[list[str] | None, typer.Option("--listen", help="Multiaddress to listen on; may be repeated.")]
AnnounceOption = Annotated[
    list[str] | None,
    typer.Option("--announce", help="Multiaddress that others should dial instead of the detected ones."),
]
HttpOption = Annotated[
    str | None, typer.Option("--http", metavar="HOST:PORT", help="Serve the status page here, e.g. 127.0.0.1:8080.")
]
NameOption = Annotated[str, typer.Option("--name", help="Name shown on the status page, at most 32 characters.")]
EventsOption = Annotated[
    bool, typer.Option("--events", help="Print every event as one JSON line instead of a live view.")
]
RunOption = Annotated[
    str | None, typer.Option("--run", help="Name or id of the run [default: the latest of this home]")
]


def say(*lines: str) -> None:
    """Print lines for people, or one for programs."""
    sys.stdout.write("\n".join(lines) + "\n")


def setting(text: str) -> tuple[str, Any]:
    """`sync.alpha=0.5` → ("sync.alpha", 0.5); values are JSON, or plain words."""
    key, separator, value = text.partition("=")
    if not separator or "." not in key:
        raise UserError(f"--set {text!r} is not of the form section.field=value, such as sync.alpha=0.5")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def numbers(text: str, option: str) -> list[int]:
    """`2,3` → [2, 3]."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option} {text!r} is not a list of numbers, such as 2,3") from None


def peer_addresses(given: list[str] | None) -> tuple[str, ...]:
    """The addresses of `--peer`: a wrong one is told at once, and not after seconds of imports."""
    for address in given or []:
        split_address(address)
    return tuple(given or [])


def listen_addresses(given: list[str] | None, *, default: str) -> tuple[str, ...]:
    """The addresses of `--listen`: that we could not listen there is told at once as well."""
    addresses = tuple(given or [default])
    for address in addresses:
        check_port_is_free(address)
    return addresses


def host_port(text: str | None) -> tuple[str, int] | None:
    """`127.0.0.1:8080` → ("127.0.0.1", 8080)."""
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 65536:
        raise UserError(f"--http {text!r} is not HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]"), int(port)
