"""Machines that are not there: network namespaces around a switch, each behind a line of its own speed.

    host 0 ──line──┐
    host 1 ──line──┤ switch     both ends of a line pass only its rate (tc tbf), so uploads and downloads are limited alike
    host 2 ──line──┘

With latencies, the switch is a router: all that one host sends to another passes a process that holds it for the time between the
two (tests/net/delay.py). Made and removed by the tests themselves, which needs root and iproute2.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Namespaces", "obstacle"]

MIN_BURST_BYTES = 16_000
ROUTER = "10.177.0.254"


def obstacle() -> str | None:
    """Why namespaces cannot be made here, or None."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"iproute2 is not installed ({' and '.join(missing)} missing)"
    probe = f"llm-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Namespaces:
    """The hosts and their lines; leaving the block removes all of it.

    Args:
        rates_bits_per_s: speed of each host's line.
        latency_s: one-way times between hosts, from row to column; left out: none.
    """

    _numbers = itertools.count()

    def __init__(self, rates_bits_per_s: Sequence[int], *, latency_s: Sequence[Sequence[float]] = ()) -> None:
        self._stem = f"llm-{os.getpid()}-{next(self._numbers)}"
        self._rates, self._latency_s = tuple(rates_bits_per_s), latency_s
        self.hosts = tuple(f"10.177.0.{number}" for number in range(1, len(self._rates) + 1))
        """IP address of each host."""
        self._switch = f"{self._stem}-switch"
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._make(self._switch, stack)
            run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
            run("ip", "-n", self._switch, "link", "set", "switch", "up")
            for index in range(len(self._rates)):
                self._plug_in(index, stack)
            if self._latency_s:
                self._lengthen(stack)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def inside(self, index: int) -> tuple[str, ...]:
        """What runs a command on a host."""
        return ("ip", "netns", "exec", self._place(index))

    def sent_bytes(self, index: int) -> int:
        """Bytes that have passed the limit from that host on."""
        return self._passed(self._place(index), "line")

    def received_bytes(self, index: int) -> int:
        """Bytes that have passed the limit towards that host."""
        return self._passed(self._switch, f"port{index}")

    def set_up(self, index: int, up: bool) -> None:
        """Mend or cut the line of a host."""
        run("ip", "-n", self._switch, "link", "set", f"port{index}", "up" if up else "down")

    def cut(self, one: int, other: int) -> None:
        """Nothing passes between two hosts any more, and neither is told; both still reach all others."""
        for here, there in ((one, other), (other, one)):
            nobody = ("lladdr", "02:00:00:00:00:00", "nud", "permanent")
            run("ip", "-n", self._place(here), "neighbour", "replace", self.hosts[there], *nobody, "dev", "line")

    def mend(self, one: int, other: int) -> None:
        """Undo `cut`."""
        for here, there in ((one, other), (other, one)):
            run("ip", "-n", self._place(here), "neighbour", "delete", self.hosts[there], "dev", "line")

    def _place(self, index: int) -> str:
        return f"{self._stem}-{index}"

    def _make(self, place: str, stack: ExitStack) -> None:
        run("ip", "netns", "add", place)
        stack.callback(run, "ip", "netns", "delete", place)  # takes its ends of the lines with it
        run("ip", "-n", place, "link", "set", "lo", "up")

    def _plug_in(self, index: int, stack: ExitStack) -> None:
        place, port = self._place(index), f"port{index}"
        self._make(place, stack)
        run("ip", "-n", place, "link", "add", "line", "type", "veth", "peer", "name", port, "netns", self._switch)
        run("ip", "-n", place, "address", "add", f"{self.hosts[index]}/24", "dev", "line")
        run("ip", "-n", self._switch, "link", "set", port, "master", "switch")
        rate = self._rates[index]
        burst = max(MIN_BURST_BYTES, rate // 8 // 100)  # 10 ms: the kernel's timer must keep up
        limit = ("rate", f"{rate}bit", "burst", str(burst), "latency", "400ms")
        for end, device in ((place, "line"), (self._switch, port)):
            run("ip", "-n", end, "link", "set", device, "up")
            run("tc", "-n", end, "qdisc", "add", "dev", device, "root", "tbf", *limit)

    def _lengthen(self, stack: ExitStack) -> None:
        """Send everything between hosts through a process that delays it."""
        for index, host in enumerate(self.hosts):  # no host reaches another but through the router
            place = self._place(index)
            run("ip", "-n", place, "address", "replace", f"{host}/32", "dev", "line")
            run("ip", "-n", place, "address", "delete", f"{host}/24", "dev", "line")
            run("ip", "-n", place, "route", "add", ROUTER, "dev", "line")
            run("ip", "-n", place, "route", "add", "default", "via", ROUTER)
        inside = ("ip", "netns", "exec", self._switch)
        settings = ("net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0")
        run(*inside, "sysctl", "-q", "-w", *settings)
        run("ip", "-n", self._switch, "address", "add", f"{ROUTER}/24", "dev", "switch")
        delay = subprocess.Popen(
            [*inside, sys.executable, "-m", "tests.net.delay", "delay"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the hosts; this ends after them
        )
        stack.enter_context(delay)
        assert delay.stdin is not None
        assert delay.stdout is not None
        stack.callback(delay.stdin.close)
        rows = zip(self.hosts, self._latency_s, strict=True)
        delay.stdin.write(json.dumps({host: dict(zip(self.hosts, row, strict=True)) for host, row in rows}) + "\n")
        delay.stdin.flush()
        if delay.stdout.readline() != "ready\n":
            raise RuntimeError("packets can not be delayed here: see what tests/net/delay.py wrote above")
        run("ip", "-n", self._switch, "link", "set", "delay", "up", "txqueuelen", "10000")
        run("ip", "-n", self._switch, "route", "add", "default", "dev", "delay", "table", "100")
        run("ip", "-n", self._switch, "rule", "add", "iif", "switch", "table", "100")

    @staticmethod
    def _passed(place: str, device: str) -> int:
        shown: list[dict[str, Any]] = json.loads(run("tc", "-n", place, "-s", "-j", "qdisc", "show", "dev", device))
        return sum(int(entry["bytes"]) for entry in shown if entry["kind"] == "tbf")
