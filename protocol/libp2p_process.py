"""The p2pd process: its private directory, its command line, its birth and its end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from protocol.errors import UserError
from protocol.libp2p_addresses import check_port_is_free, is_loopback
from protocol.libp2p_hivemind import P2PD_FILENAME, binaries

__all__ = ["MAX_MESSAGE_BYTES", "DaemonConfig", "DaemonProcess"]

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 << 20
_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 1.0
_MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 108
_GO_SETTINGS = {"GOMEMLIMIT": "512MiB", "GOGC": "400"}
"""Moving bulk data makes p2pd collect garbage all the time: with its heap allowed to grow to five times what is live (some 100 MB)
it needs an eighth less processor time per byte over Noise and a third less over TLS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """How to start p2pd."""

    identity_path: Path
    runtime_dir: Path
    listen: Sequence[str]
    announce: Sequence[str] = ()
    relays: Sequence[str] = ()
    """Peers that may relay to us when we are behind a NAT."""
    relay_service: bool = False
    """Whether we relay for others; only useful on a publicly reachable machine."""


class DaemonProcess:
    """At most one running p2pd in a directory of its own.

    Args:
        config: how to start it.
    """

    def __init__(self, config: DaemonConfig) -> None:
        self.listen = list(config.listen)
        """Listen addresses of the next start; once the ports are known they replace zeros here."""
        self.control_socket = config.runtime_dir.absolute() / "control.sock"
        self.stream_socket = config.runtime_dir.absolute() / "streams.sock"
        self._config = config
        self._pid_file = config.runtime_dir / "p2pd.pid"
        self._lock_file: int | None = None
        self._child: asyncio.subprocess.Process | None = None
        self._drain: asyncio.Task[None] | None = None

    def claim_directory(self) -> None:
        """Make the directory ours, private, and free of what a crash left there.

        Raises:
            UserError: another process uses it, or its path is too long.
        """
        directory = self._config.runtime_dir
        if len(os.fsencode(self.control_socket)) > _MAX_SOCKET_PATH_BYTES:
            raise UserError(f"runtime directory {directory} is too long a path for a socket; choose a shorter one")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        lock_file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_file)
            raise UserError(f"another node runs in {directory}; stop it or choose another directory") from None
        self._lock_file = lock_file
        self._sweep()

    def release_directory(self) -> None:
        """Undo `claim_directory`; idempotent."""
        if self._lock_file is not None:
            self._sweep()
            os.close(self._lock_file)
            self._lock_file = None

    def _sweep(self) -> None:
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            pid, started_at_s = self._pid_file.read_text().split()
            stale = psutil.Process(int(pid))
            if stale.create_time() == float(started_at_s):  # else the number belongs to some other process by now
                stale.kill()
        for path in (self._pid_file, *self._config.runtime_dir.glob("*.sock")):
            path.unlink(missing_ok=True)

    async def start(self) -> None:
        """Start p2pd and wait until it serves its control socket.

        Raises:
            UserError: a port is taken, an address is wrong, or p2pd does not come up.
        """
        for address in self.listen:
            check_port_is_free(address)
        self.control_socket.unlink(missing_ok=True)
        launcher = str(Path(__file__).with_name("libp2p_launch.py"))
        binary = str(Path(binaries.__path__[0]) / P2PD_FILENAME)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", launcher, str(os.getpid()), binary, *self._arguments()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us alone: p2pd must live until we have said goodbye
            env={"GOLOG_LOG_LEVEL": "error", "GOLOG_LOG_FMT": "json", **_GO_SETTINGS},
        )
        self._child = child
        with contextlib.suppress(psutil.Error):
            self._pid_file.write_text(f"{child.pid} {psutil.Process(child.pid).create_time()!r}")
        assert child.stdout is not None
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await _wait_until_up(child.stdout)
        except TimeoutError:
            raise UserError(f"p2pd did not start within {_START_TIMEOUT_S:g} s; is the machine overloaded?") from None
        self._drain = asyncio.get_running_loop().create_task(_drain(child.stdout))

    def _arguments(self) -> list[str]:
        config = self._config
        options = {
            "listen": f"/unix{self.control_socket}",
            "id": config.identity_path,
            "hostAddrs": ",".join(self.listen),
            "announceAddrs": ",".join(config.announce),
            "trustedRelays": ",".join(config.relays),
            "autoRelay": int(bool(config.relays)),
            "relayDiscovery": 0,
            "relay": 1,
            "relayService": int(config.relay_service),
            "forceReachabilityPublic": int(config.relay_service),
            "autonat": 1,
            "natPortMap": int(not all(map(is_loopback, self.listen))),
            "connManager": 1,
            "connGrace": "10s",
            "dhtServer": 1,
            "tls": 1,
            "noise": 0,
            "idleTimeout": "30s",
            "persistentConnMaxMsgSize": MAX_MESSAGE_BYTES,
        }
        return [f"-{name}={value}" for name, value in options.items() if value != ""]

    async def wait(self) -> None:
        """Return when p2pd has ended."""
        assert self._child is not None
        await self._child.wait()

    async def stop(self) -> None:
        """End p2pd if it runs; idempotent."""
        child, self._child = self._child, None
        if child is None:
            return
        _signal(child, signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await child.wait()
        except TimeoutError:
            _signal(child, signal.SIGKILL)
            await child.wait()
        if self._drain is not None:
            await self._drain  # ends with p2pd's output
            self._drain = None


def _signal(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    # Not `child.terminate()`: it polls, and so may snatch the exit status from under asyncio's own watcher.
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)


async def _wait_until_up(output: asyncio.StreamReader) -> None:
    last_line = ""
    async for raw in output:
        line = raw.decode(errors="replace").strip()
        if line.startswith("Peer ID:"):
            return
        last_line = line or last_line
    raise UserError(f"p2pd did not start: {last_line[:200]}; check the listen addresses and the identity file")


async def _drain(output: asyncio.StreamReader) -> None:
    """Keep p2pd's output from filling its pipe, which would stop it."""
    while text := await output.read(1 << 16):
        logger.debug("p2pd: %s", text.decode(errors="replace").rstrip())
