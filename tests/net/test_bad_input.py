"""What a user can get wrong with addresses, ports and keys: one line on standard error, exit code 1, nothing left running."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from protocol.identity import Identity
from tests.net.swarm import LISTEN, Swarm

pytestmark = [pytest.mark.net, pytest.mark.timeout(240)]

STRANGER = Identity.generate(b"\7" * 32).peer_id


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def refusal(swarm: Swarm, *arguments: str) -> str:
    """Run a command that must fail, and return its one line."""
    done = swarm.command(*arguments)
    assert done.returncode == 1, (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("llm-node: ")
    return lines[0]


def test_an_unreachable_peer(swarm: Swarm, tmp_path: Path) -> None:
    address = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{STRANGER}"
    line = refusal(swarm, "join", f"--peer={address}", LISTEN, f"--home={tmp_path}")
    assert address in line
    assert "check the address" in line
    assert address in refusal(swarm, "status", f"--peer={address}")


def test_a_malformed_peer(swarm: Swarm, tmp_path: Path) -> None:
    assert "'nonsense' is not an address" in refusal(swarm, "join", "--peer=nonsense", LISTEN, f"--home={tmp_path}")
    assert not (tmp_path / "blobs").exists()
    address = f"/ip4/127.0.0.1/tcp/99999/p2p/{STRANGER}"
    assert address in refusal(swarm, "status", f"--peer={address}")


def test_no_peer_at_all(swarm: Swarm, tmp_path: Path) -> None:
    assert "--peer" in refusal(swarm, "join", LISTEN, f"--home={tmp_path}")


def test_somebody_else_at_the_address(swarm: Swarm, tmp_path: Path) -> None:
    node = swarm.bootstrap()
    address = f"{node.address.rsplit('/', 1)[0]}/{STRANGER}"
    assert address in refusal(swarm, "join", f"--peer={address}", LISTEN, f"--home={tmp_path}")


def test_a_port_in_use(swarm: Swarm, tmp_path: Path) -> None:
    node = swarm.bootstrap()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        listen = f"--listen=/ip4/127.0.0.1/tcp/{port}"
        line = refusal(swarm, "join", f"--peer={node.address}", listen, f"--home={tmp_path}")
        assert f"port {port}" in line
        http = f"--http=127.0.0.1:{port}"
        line = refusal(swarm, "join", f"--peer={node.address}", LISTEN, http, f"--home={tmp_path}")
        assert port in line


def test_an_identity_in_use(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap()
    trainer = swarm.trainers(1)[0]
    line = refusal(swarm, "join", f"--peer={bootstrap.address}", LISTEN, f"--home={trainer.home}")
    assert "another process uses the identity" in line
    line = refusal(swarm, "bootstrap", str(swarm.folder / "run.toml"), LISTEN, f"--home={bootstrap.home}")
    assert "another process uses the identity" in line
    trainer.wait_for("exchange", since=trainer.mark())
    assert trainer.is_alive
    assert bootstrap.is_alive
