"""Becomes p2pd, after tying its life to its parent's: `python libp2p_launch.py <parent pid> <p2pd> <arguments…>`.

Linux kills a process when its parent dies if the process asks for it (PR_SET_PDEATHSIG), and the wish survives exec.
Asking from a program of its own, and not between fork and exec of a process full of threads, can not deadlock.
Elsewhere a p2pd left behind by a crash is found by its recorded pid at the next start.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

__all__: list[str] = []

_PR_SET_PDEATHSIG = 1
_MAX_OPEN_FILES = 65_536


def _launch(parent_pid: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent_pid:  # it died before we asked
            sys.exit(1)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > _MAX_OPEN_FILES:
        hard = _MAX_OPEN_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.execv(command[0], command)


if __name__ == "__main__":
    _launch(int(sys.argv[1]), sys.argv[2:])
