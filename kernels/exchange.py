"""The passes over whole vectors that an exchange is made of, in C: each reads and writes every vector once.

    size      Σ x²
    pack      Δ = θ − φ;  payloads ← encode(Δ + b·residual), encode(φ or θ);  anchor ← θ;  Σ Δ²
    measure   Σ (theirs − ours)², per block on demand; blocks of the lattice that could not be read count nothing
    step      residual ← b·residual + Δ − sent;  φ, δ ← outer step;  θ ← (θ − anchor) + φ;  Σ (φ − anchor)²

kernels/exchange.c compiles in half a second where torch.compile takes ten and more, and keeps a block in the first cache from
reading to writing, whatever formats and vectors come together: 2 to 4 times as fast as what torch makes of
averaging/fused_loops.py. Payloads have the same bytes as everywhere. CPU only.

Shape legend: N elements of a piece, B blocks of 256. A piece begins at a multiple of 256 of its payload's vector; only the last one
of the vector may end elsewhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.dispatch import is_worthwhile
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

BLOCK = 256
SOURCE = Path(__file__).with_name("exchange.c")
CODECS = {"": 0, "fp32": 1, "bf16": 2, "q8": 3, "q4": 4, "e3m0": 5, "lattice": 6}
"""Formats by name; "" is no payload."""
_BLOCK_SIZES = {"q4": 64, "e3m0": 64}
ALGORITHMS = {"pair-average": 0, "noloco": 1, "heavy-ball": 2, "nesterov": 3, "sparseloco": 4}
"""Rules of averaging/outer.py; diloco by the name of its momentum."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A payload and what is to be read from it.

    Args:
        codec: one of CODECS.
        payload: uint8, of a whole vector.
        numel: elements of that vector.
        start: the one in it with which the piece begins.
        factor: on what this partner's payload adds.
    """

    codec: str
    payload: Tensor
    numel: int
    start: int
    factor: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceVectors:
    """One piece of the state: fp32 [N] each, contiguous; empty where absent. The anchor may be φ itself."""

    theta: Tensor
    phi: Tensor
    momentum: Tensor
    residual: Tensor
    anchor: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one step is taken.

    Args:
        algorithm: one of ALGORITHMS.
        alpha, beta, gamma: see averaging/outer.py.
        scale: factor on φ's step.
        clip: factor on δ.
        keep: share of the correction that θ takes.
        error_decay: b.
        slow_is_theta: whether the slow payload is θ and not φ.
        keeps_residual: whether the residual takes what the codec of Δ lost.
        own_factor: on our own Δ in the mean; None for Δ as it was before encoding, without the partners'.
        is_dry: measure the step and change nothing.
    """

    algorithm: str
    alpha: float
    beta: float
    gamma: float
    scale: float
    clip: float
    keep: float
    error_decay: float
    slow_is_theta: bool
    keeps_residual: bool
    own_factor: float | None
    is_dry: bool = False


class _Payload(ctypes.Structure):
    _fields_ = (
        ("codec", ctypes.c_int32),
        ("factor", ctypes.c_float),
        ("bytes", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("start", ctypes.c_int64),
    )


class _Vectors(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("theta", "phi", "momentum", "residual", "anchor"))


class _Pack(ctypes.Structure):
    _fields_ = (
        ("vectors", _Vectors),
        ("numel", ctypes.c_int64),
        ("delta", _Payload),
        ("slow", _Payload),
        ("distance", ctypes.c_void_p),
        ("drift", ctypes.c_float),
        ("error_decay", ctypes.c_float),
        ("slow_is_theta", ctypes.c_int32),
        ("moved_by_momentum", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
    )


class _Measure(ctypes.Structure):
    _fields_ = (
        ("near", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("ours", _Payload),
        ("theirs", _Payload),
        ("weights", ctypes.c_void_p),
        ("squares", ctypes.c_void_p),
        ("readable", ctypes.c_void_p),
        ("num_unreadable", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("vectors", _Vectors),
        ("numel", ctypes.c_int64),
        ("own_delta", _Payload),
        ("own_slow", _Payload),
        ("deltas", ctypes.c_void_p),
        ("slows", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("num_partners", "rule", "slow_is_theta", "keeps_residual", "is_dry")),
        *(
            (name, ctypes.c_float)
            for name in ("own_factor", "alpha", "beta", "gamma", "scale", "clip", "keep", "error_decay")
        ),
        ("weights", ctypes.c_void_p),
    )


_ABSENT = _Payload(0, 0.0, None, 0, 0)


def use_native(numel: int, *, wanted: bool | None, device: torch.device) -> bool:
    """Whether to take this route: the arguments of `dispatch.use_compiled`, and where the vectors are."""
    return is_worthwhile(numel, wanted=wanted) and device.type == "cpu" and is_available()


def is_available() -> bool:
    """Whether this machine compiles it."""
    return compiled_library(SOURCE) is not None


def size(x: Tensor) -> float:
    """Σ x² of fp32 [N], contiguous; not finite if a value is not, or where its square overflows."""
    return float(_function("llm_node_size", ctypes.c_void_p, ctypes.c_int64)(_address(x), x.numel()))


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
    arguments = _Pack(
        _vectors(vectors),
        vectors.theta.numel(),
        _payload(delta),
        _payload(slow),
        _address(distance),
        drift,
        error_decay,
        slow_is_theta,
        moved_by_momentum,
        _address(weights),
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
    arguments = _Measure(
        _address(near),
        numel,
        _payload(ours),
        _payload(theirs),
        _address(weights),
        _address(squares),
        _address(readable),
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
    partners = [(_Payload * max(count, 1))(*map(_payload, each)) for each in (deltas, slows)]
    weights = checksum_weights(vectors.theta.device)
    arguments = _Step(
        _vectors(vectors),
        vectors.theta.numel(),
        _payload(own_delta),
        _payload(own_slow),
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
        _address(weights),
    )
    return float(_function("llm_node_step", ctypes.c_void_p)(ctypes.addressof(arguments)))


def _function(name: str, *arguments: type) -> ctypes._NamedFuncPointer:
    library = compiled_library(SOURCE)
    assert library is not None, "ask is_available first"
    function = getattr(library, name)
    function.restype, function.argtypes = ctypes.c_double, arguments
    return function  # type: ignore[no-any-return]


def _payload(encoded: Encoded | None) -> _Payload:
    if encoded is None:
        return _ABSENT
    num_blocks = -(-encoded.numel // _BLOCK_SIZES.get(encoded.codec, BLOCK))
    address = _address(encoded.payload)
    return _Payload(CODECS[encoded.codec], encoded.factor, address, num_blocks, encoded.start)


def _vectors(vectors: PieceVectors) -> _Vectors:
    each = (vectors.theta, vectors.phi, vectors.momentum, vectors.residual, vectors.anchor)
    return _Vectors(*map(_address, each))


def _address(x: Tensor | None) -> int | None:
    """Where a tensor's memory is; None for an empty one."""
    if x is None or x.numel() == 0:
        return None
    assert x.device.type == "cpu"
    assert x.is_contiguous()
    return x.data_ptr()
