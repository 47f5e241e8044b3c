"""A long line in user space: packets between hosts wait for so long as they would travel, in the order in which they came.

The kernel at hand can limit rates but not delay (no netem). It routes packets into a TUN device; this process holds each one for
the time that lies between its two hosts, and writes it back to the device, from where the kernel routes it on. Unlike behind a
proxy that ends connections, TCP sees the whole way: acknowledgements, slow start and windows take their time.

    python -m tests.net.delay DEVICE < one line of JSON: {"FIRST ADDRESS": {"SECOND ADDRESS": seconds, …}, …}

says `ready` when the device is there, and ends with its standard input.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Mapping
from heapq import heappop, heappush

__all__ = ["forward", "open_tun"]

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MAX_PACKET_BYTES = 1 << 16
_MAX_BATCH = 64
"""Packets read before those that are due are written."""


def open_tun(device: str) -> int:
    """A new TUN device of that name in this network namespace: its file descriptor, which does not block."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI))
    return tun


def forward(tun: int, delays_s: Mapping[bytes, float]) -> None:
    """Delay packets until standard input ends.

    Args:
        delays_s: by the eight bytes of source and destination address, as they stand in an IPv4 header; other packets are dropped.
    """
    waiting: list[tuple[float, int, bytes]] = []
    number = 0
    while True:
        pause_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([tun, sys.stdin], [], [], pause_s)
        if sys.stdin in ready:
            return
        now = time.monotonic()
        for _ in range(_MAX_BATCH if ready else 0):
            try:
                packet = os.read(tun, _MAX_PACKET_BYTES)
            except BlockingIOError:
                break
            delay_s = delays_s.get(packet[12:20])
            if delay_s is not None and packet[0] >> 4 == 4:
                number += 1  # keeps the order of those that are due at the same time
                heappush(waiting, (now + delay_s, number, packet))
        while waiting and waiting[0][0] <= now:
            try:
                os.write(tun, waiting[0][2])
            except BlockingIOError:
                break
            heappop(waiting)


def main() -> None:
    """See above."""
    tun = open_tun(sys.argv[1])
    table: dict[str, dict[str, float]] = json.loads(sys.stdin.readline())
    delays_s = {
        socket.inet_aton(source) + socket.inet_aton(target): delay_s
        for source, row in table.items()
        for target, delay_s in row.items()
    }
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    forward(tun, delays_s)


if __name__ == "__main__":
    main()
