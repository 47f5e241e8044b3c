"""C beside Python: source files of ours, compiled when it is first needed and loaded.

Every process compiles anew, into a folder that is gone a moment later: that takes less than a second, nobody can plant a library
for us to load, and the code fits the processor that runs it. Without a C compiler there is None, and the caller goes on in Python:
each of these files repeats something that is there in Python or torch.

Flags never let the compiler change a result: no fused multiply-add, no reordered sums.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["COMPILERS", "compiled_library"]

COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 60.0
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_FASTEST = (("-O3", "-march=native", "-mprefer-vector-width=512"), ("-O3", "-march=native"), ("-O3",))
"""The first that the compiler takes: some know -march=native for some processors only, and widths are those of x86."""


@functools.cache
def compiled_library(*sources: Path) -> ctypes.CDLL | None:
    """The library made of these C files, or None where that does not work. Its functions run without Python's lock."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or os.name != "posix":
        return None
    with (
        contextlib.suppress(OSError),
        tempfile.TemporaryDirectory(prefix="llm-node-native-") as folder,
    ):  # no room, maybe
        library = Path(folder) / "native.so"
        for flags in _FASTEST:
            command = [compiler, *flags, *_EXACT, "-o", str(library), *map(str, sources), "-lm"]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
                return ctypes.CDLL(str(library))
            except (OSError, subprocess.SubprocessError):
                continue
    return None
