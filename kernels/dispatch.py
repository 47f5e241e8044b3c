"""Which route a kernel takes: eager torch in cache-sized tiles, or the same function through torch.compile.

Both routes give the same bytes. Compiled code is several times faster but costs half a minute the first time on a machine, so
it must be asked for, or the tensor must be large enough to earn it back. A machine without a C++ compiler raises at the
first call even with a warm cache; one probe finds out, and such a machine stays eager.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["COMPILE_MIN_NUMEL", "compiled_version", "compiler_works", "is_worthwhile", "tile_numel", "use_compiled"]

COMPILE_MIN_NUMEL = 16_000_000
"""Smallest tensor, in elements, for which compiling is worth its start-up cost without being asked for."""

_MAX_VARIANTS = 64

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


def tile_numel(device: torch.device) -> int:
    """Elements that eager kernels handle at a time: a tile and its scratch stay in a core's cache on a CPU; on a GPU the
    tile only bounds the scratch memory and must be large enough to hide launch costs."""
    return 1 << 17 if device.type == "cpu" else 1 << 22


def use_compiled(numel: int, *, wanted: bool | None) -> bool:
    """Decide the route.

    Args:
        numel: elements of the tensor that the kernels will work on.
        wanted: True to ask for compiled code, False to forbid it, None to let the size decide.

    Returns:
        Whether to take the compiled route; False where no compiler works.
    """
    return is_worthwhile(numel, wanted=wanted) and compiler_works()


def is_worthwhile(numel: int, *, wanted: bool | None) -> bool:
    """The same, whether a compiler works here or not."""
    return numel >= COMPILE_MIN_NUMEL if wanted is None else wanted


@functools.cache
def compiler_works() -> bool:
    """Whether torch.compile produces running code here. The first call compiles a one-line function (seconds)."""

    def increment(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    try:
        return float(torch.compile(increment)(torch.zeros(8)).sum()) == 8.0
    except (RuntimeError, OSError, ImportError):  # no compiler, one too old, or a cache folder that cannot be written
        return False


@functools.cache
def compiled_version(function: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
    """The compiled form of a kernel, made once per function; sizes are dynamic, so that new ones do not recompile."""
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        # One function has variants per wire format, rule and alignment; beyond torch's own limit of 8 it would raise. The setting
        # belongs to the thread.
        torch._dynamo.config.recompile_limit = _MAX_VARIANTS
        return compiled(*args, **kwargs)

    return call
