"""What the passes of kernels/exchange.py take, as Python says it and as C reads it (kernels/exchange.h)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor

__all__ = [
    "ALGORITHMS",
    "BLOCK",
    "CODECS",
    "Encoded",
    "MeasureArguments",
    "PackArguments",
    "Payload",
    "PieceVectors",
    "Rule",
    "StepArguments",
    "address_of",
    "payload_of",
    "vectors_of",
]

BLOCK = 256
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


class Payload(ctypes.Structure):
    """`Payload` of exchange.h."""

    _fields_ = (
        ("codec", ctypes.c_int32),
        ("factor", ctypes.c_float),
        ("bytes", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("start", ctypes.c_int64),
    )


class Vectors(ctypes.Structure):
    """`Vectors` of exchange.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("theta", "phi", "momentum", "residual", "anchor"))


class PackArguments(ctypes.Structure):
    """`Pack` of exchange.h."""

    _fields_ = (
        ("vectors", Vectors),
        ("numel", ctypes.c_int64),
        ("delta", Payload),
        ("slow", Payload),
        ("distance", ctypes.c_void_p),
        ("drift", ctypes.c_float),
        ("error_decay", ctypes.c_float),
        ("slow_is_theta", ctypes.c_int32),
        ("moved_by_momentum", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
    )


class MeasureArguments(ctypes.Structure):
    """`Measure` of exchange.h."""

    _fields_ = (
        ("near", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("ours", Payload),
        ("theirs", Payload),
        ("weights", ctypes.c_void_p),
        ("squares", ctypes.c_void_p),
        ("readable", ctypes.c_void_p),
        ("num_unreadable", ctypes.c_int64),
    )


class StepArguments(ctypes.Structure):
    """`Step` of exchange.h."""

    _fields_ = (
        ("vectors", Vectors),
        ("numel", ctypes.c_int64),
        ("own_delta", Payload),
        ("own_slow", Payload),
        ("deltas", ctypes.c_void_p),
        ("slows", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("num_partners", "rule", "slow_is_theta", "keeps_residual", "is_dry")),
        *(
            (name, ctypes.c_float)
            for name in ("own_factor", "alpha", "beta", "gamma", "scale", "clip", "keep", "error_decay")
        ),
        ("weights", ctypes.c_void_p),
    )


_ABSENT = Payload(0, 0.0, None, 0, 0)


def payload_of(encoded: Encoded | None) -> Payload:
    """As C reads it; codec 0 for what does not travel."""
    if encoded is None:
        return _ABSENT
    num_blocks = -(-encoded.numel // _BLOCK_SIZES.get(encoded.codec, BLOCK))
    address = address_of(encoded.payload)
    return Payload(CODECS[encoded.codec], encoded.factor, address, num_blocks, encoded.start)


def vectors_of(vectors: PieceVectors) -> Vectors:
    """Their addresses; the caller keeps the tensors alive."""
    each = (vectors.theta, vectors.phi, vectors.momentum, vectors.residual, vectors.anchor)
    return Vectors(*map(address_of, each))


def address_of(x: Tensor | None) -> int | None:
    """Where a tensor's memory is; None for an empty one."""
    if x is None or x.numel() == 0:
        return None
    assert x.device.type == "cpu"
    assert x.is_contiguous()
    return x.data_ptr()
