"""Multiaddresses as we accept and show them: TCP over IP or a name, possibly through a relay, ending in a peer id."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from protocol.errors import UserError
from protocol.ids import PeerId

__all__ = ["check_port_is_free", "dialable", "is_loopback", "split_address", "with_known_port"]

_PEER = r"(?P<peer>12D3KooW[1-9A-HJ-NP-Za-km-z]{44}|Qm[1-9A-HJ-NP-Za-km-z]{44})"
_HOST = r"/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[0-9A-Za-z.:_-]{1,253})/tcp/(?P<port>[0-9]{1,5})"
_RELAYED = r"(?:/p2p/[1-9A-HJ-NP-Za-km-z]{46,52}/p2p-circuit)?"
_LISTEN = re.compile(_HOST)
_FULL = re.compile(rf"(?P<path>{_HOST}{_RELAYED})/p2p/{_PEER}")
MAX_ADDRESS_CHARS = 512


def _host_is_valid(match: re.Match[str]) -> bool:
    if int(match["port"]) > 65_535:
        return False
    if not match["kind"].startswith("ip"):
        return True
    try:
        address = ipaddress.ip_address(match["host"])
    except ValueError:
        return False
    return address.version == int(match["kind"][2])


def split_address(address: str) -> tuple[str, PeerId]:
    """Split `/ip4/192.0.2.1/tcp/4001/p2p/12D3…` into the way and the peer id.

    Raises:
        UserError: it is not such an address.
    """
    match = _FULL.fullmatch(address) if len(address) <= MAX_ADDRESS_CHARS else None
    if match is None or not _host_is_valid(match) or match["port"].strip("0") == "":
        shown = ascii(address[:100])
        raise UserError(f"{shown} is not an address; use one like /ip4/<address>/tcp/<port>/p2p/<peer id>")
    return match["path"], PeerId(match["peer"])


def _listen_match(address: str) -> re.Match[str]:
    match = _LISTEN.fullmatch(address)
    if match is None or not _host_is_valid(match):
        raise UserError(f"{address[:100]!a} is not a listen address; use one like /ip4/0.0.0.0/tcp/4001")
    return match


def is_loopback(address: str) -> bool:
    """Whether a multiaddress names this machine only."""
    match = _LISTEN.match(address)
    if match is None or not match["kind"].startswith("ip"):
        return False
    return _host_is_valid(match) and ipaddress.ip_address(match["host"]).is_loopback


def check_port_is_free(address: str) -> None:
    """See whether we could listen there. p2pd itself would share the port with another p2pd of ours (SO_REUSEPORT), and
    the two would get each other's connections.

    Raises:
        UserError: the port is taken or the address is not of this machine.
    """
    match = _listen_match(address)
    family = socket.AF_INET6 if match["kind"] == "ip6" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((match["host"], int(match["port"])))
            probe.listen(1)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"cannot listen on port {match['port']} of {match['host']} ({reason}); "
                "choose another port or stop the program that uses it"
            ) from None


def with_known_port(address: str, actual: Sequence[str]) -> str:
    """Replace port 0 in a listen address by the port that p2pd got, so that a restart gets the same."""
    match = _listen_match(address)
    if int(match["port"]):
        return address
    for other in map(_LISTEN.match, actual):
        if other is None or other["kind"] != match["kind"]:
            continue
        if ipaddress.ip_address(match["host"]).is_unspecified or other["host"] == match["host"]:
            return f"/{match['kind']}/{match['host']}/tcp/{other['port']}"
    return address


def dialable(addresses: Sequence[str], peer: PeerId) -> list[str]:
    """Those of a host's own TCP addresses that others can dial, with `/p2p/<peer>` at the end.

    Unspecified addresses are dropped, and loopback ones too unless there are no others.
    """
    usable = []
    for address in addresses:
        full = f"{address}/p2p/{peer}"
        match = _FULL.fullmatch(full)
        if match is None or not _host_is_valid(match):
            continue
        if match["kind"].startswith("ip") and ipaddress.ip_address(match["host"]).is_unspecified:
            continue
        usable.append(full)
    return [address for address in usable if not is_loopback(address)] or usable
