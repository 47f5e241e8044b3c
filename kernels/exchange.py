"""The passes over whole vectors that an exchange is made of, in C: each reads and writes every vector once.

    size      Σ x²
    pack      Δ = θ − φ;  payloads ← encode(Δ + b·residual), encode(φ or θ);  anchor ← θ;  Σ Δ²
    measure   Σ (theirs − ours)², per block on demand; blocks of the lattice that could not be read count nothing
    step      residual ← b·residual + Δ − sent;  φ, δ ← outer step;  θ ← (θ − anchor) + φ;  Σ (φ − anchor)²

kernels/exchange.c and exchange_step.c compile in less than a second where torch.compile takes ten and more, and keep a block in the
first cache from reading to writing, whatever formats and vectors come together: 2 to 4 times as fast as what torch makes of
averaging/fused_loops.py. Payloads have the same bytes as everywhere. CPU only.

Shape legend: N elements of a piece, B blocks of 256. A piece begins at a multiple of 256 of its payload's vector; only the last one
of the vector may end elsewhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels.dispatch import is_worthwhile
from kernels.exchange_arguments import (
    ALGORITHMS,
    BLOCK,
    CODECS,
    Encoded,
    MeasureArguments,
    PackArguments,
    Payload,
    PieceVectors,
    Rule,
    StepArguments,
    address_of,
    payload_of,
    vectors_of,
)
from kernels.lattice import checksum_weights
from kernels.native import compiled_library

__all__ = [
    "ALGORITHMS",
    "BLOCK",
    "CODECS",
    "Encoded",
    "PieceVectors",
    "Rule",
    "is_available",
    "measure",
    "pack",
    "size",
    "step",
    "use_native",
]

SOURCES = tuple(Path(__file__).with_name(name) for name in ("exchange.c", "exchange_step.c"))


def use_native(numel: int, *, wanted: bool | None, device: torch.device) -> bool:
    """Whether to take this route: the arguments of `dispatch.use_compiled`, and where the vectors are."""
    return is_worthwhile(numel, wanted=wanted) and device.type == "cpu" and is_available()


def is_available() -> bool:
    """Whether this machine compiles it."""
    return compiled_library(*SOURCES) is not None


def size(x: Tensor) -> float:
    """Σ x² of fp32 [N], contiguous; not finite if a value is not, or where its square overflows."""
    return float(_function("llm_node_size", ctypes.c_void_p, ctypes.c_int64)(address_of(x), x.numel()))


def pack(
    vectors: PieceVectors,
    *,
    delta: Encoded | None,
    slow: Encoded | None,
    slow_is_theta: bool,
    moved_by_momentum: bool = False,
    error_decay: float = 1.0,
    distance: Tensor | None = None,
    drift: float = 0.0,
) -> float:
    """Encode a piece and remember θ.

    Args:
        vectors: the anchor takes θ.
        delta, slow: written; None for what does not travel.
        slow_is_theta: whether θ is the slow payload, not φ.
        moved_by_momentum: whether δ may have moved φ farther than Δ says, for the lattice.
        error_decay: b, on the residual that is added to Δ.
        distance: of the lattice's window, fp32 [B], raised to what the blocks moved.
        drift: the window's.

    Returns:
        Σ Δ².
    """
    weights = checksum_weights(vectors.theta.device)
    arguments = PackArguments(
        vectors_of(vectors),
        vectors.theta.numel(),
        payload_of(delta),
        payload_of(slow),
        address_of(distance),
        drift,
        error_decay,
        slow_is_theta,
        moved_by_momentum,
        address_of(weights),
    )
    return float(_function("llm_node_pack", ctypes.c_void_p)(ctypes.addressof(arguments)))


def measure(
    ours: Encoded,
    theirs: Encoded,
    *,
    numel: int,
    near: Tensor | None = None,
    squares: Tensor | None = None,
    readable: Tensor | None = None,
) -> tuple[float, int]:
    """How far a partner's payload is from ours.

    Args:
        ours, theirs: two payloads of the same format.
        numel: N.
        near: fp32 [N], what we encoded; the lattice needs it.
        squares: fp32 [B], takes the sum of every block.
        readable: uint8 [B], takes 1 for every block that could be read.

    Returns:
        Σ (theirs − ours)², and how many blocks could not be read.
    """
    weights = checksum_weights(ours.payload.device)
    arguments = MeasureArguments(
        address_of(near),
        numel,
        payload_of(ours),
        payload_of(theirs),
        address_of(weights),
        address_of(squares),
        address_of(readable),
        0,
    )
    total = float(_function("llm_node_measure", ctypes.c_void_p)(ctypes.addressof(arguments)))
    return total, arguments.num_unreadable


def step(
    vectors: PieceVectors,
    rule: Rule,
    *,
    own_delta: Encoded | None,
    own_slow: Encoded | None,
    deltas: Sequence[Encoded | None],
    slows: Sequence[Encoded | None],
) -> float:
    """Take the outer step on a piece and correct θ by it.

    Args:
        vectors: all but the anchor are changed.
        rule: how.
        own_delta, own_slow: what we sent.
        deltas, slows: one per partner, with its factor; None for what did not travel.

    Returns:
        Σ (φ' − anchor)²; of a dry step, its own squares.
    """
    count = len(slows)
    assert len(deltas) == count
    partners = [(Payload * max(count, 1))(*map(payload_of, each)) for each in (deltas, slows)]
    weights = checksum_weights(vectors.theta.device)
    arguments = StepArguments(
        vectors_of(vectors),
        vectors.theta.numel(),
        payload_of(own_delta),
        payload_of(own_slow),
        *map(ctypes.addressof, partners),
        count,
        ALGORITHMS[rule.algorithm],
        rule.slow_is_theta,
        rule.keeps_residual,
        rule.is_dry,
        -1.0 if rule.own_factor is None else rule.own_factor,
        rule.alpha,
        rule.beta,
        rule.gamma,
        rule.scale,
        rule.clip,
        rule.keep,
        rule.error_decay,
        address_of(weights),
    )
    return float(_function("llm_node_step", ctypes.c_void_p)(ctypes.addressof(arguments)))


def _function(name: str, *arguments: type) -> ctypes._NamedFuncPointer:
    library = compiled_library(*SOURCES)
    assert library is not None, "ask is_available first"
    function = getattr(library, name)
    function.restype, function.argtypes = ctypes.c_double, arguments
    return function  # type: ignore[no-any-return]
