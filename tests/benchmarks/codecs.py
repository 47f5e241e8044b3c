"""Codecs beside each other: bytes, speed, and error, next to hivemind's and bitsandbytes' for the same vectors.

    python -m tests.benchmarks.codecs [--json] [--numel 4194304] [--repeats 5] [--no-compile]

One thread and processor time, so that a shared machine disturbs little; best of the repeats. GB/s count the fp32 side. Errors are
relative L2 errors: of a Gaussian vector, of one with heavy tails (Student t, 3 degrees of freedom), and `error_of_motion`, the
error on Gaussian weights in units of how far they moved (1 % of their size): that is what matters where φ or θ travels.
The last line is one JSON object: name → figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from averaging.codec import DELTA_CODECS, SLOW_CODECS, codec_named
from kernels.dispatch import compiler_works, tile_numel

__all__ = ["main"]

_MOTION = 0.01


@dataclass(frozen=True, slots=True)
class Vectors:
    """What is encoded: a Gaussian, one with heavy tails, and how far each moved."""

    gaussian: Tensor
    heavy_tailed: Tensor
    motion: Tensor

    @classmethod
    def draw(cls, numel: int) -> Vectors:
        """fp32 [numel] each, always the same."""
        generator = torch.Generator().manual_seed(0)
        gaussian, motion = (torch.randn(numel, generator=generator) for _ in range(2))
        squares = torch.randn(3, numel, generator=generator).square().mean(dim=0)
        heavy = torch.randn(numel, generator=generator) / squares.sqrt()
        return cls(gaussian=gaussian * 0.02, heavy_tailed=heavy * 0.02, motion=motion * 0.02 * _MOTION)


@dataclass(frozen=True, slots=True)
class Subject:
    """One format: `encode(x, motion)` gives an object, `decode(object, near)` gives the values."""

    num_bytes: Callable[[Any], int]
    encode: Callable[[Tensor, Tensor], Any]
    decode: Callable[[Any, Tensor], Tensor]


def own(name: str, *, numel: int, compiled: bool, stochastic: bool = False) -> Subject:
    """One of our codecs, with its buffers made beforehand as in a replica."""
    codec = codec_named(name, compiled=compiled, rounding="stochastic" if stochastic else "nearest")
    payload = torch.zeros(codec.num_bytes(numel), dtype=torch.uint8)
    out, scratch = torch.zeros(numel), torch.zeros(tile_numel(torch.device("cpu")))

    def encode(x: Tensor, motion: Tensor) -> Tensor:
        codec.encode(x, payload, motion=motion, scratch=scratch, seed=1)
        return payload

    def decode(data: Tensor, near: Tensor) -> Tensor:
        codec.decode(data, out, near=near)
        return out

    return Subject(num_bytes=lambda data: data.numel(), encode=encode, decode=decode)


def hivemind_subjects() -> dict[str, Subject]:
    """hivemind's serializers, as it uses them between peers; none where it is not installed."""
    if importlib.util.find_spec("hivemind") is None:
        return {}
    import hivemind.compression as compression

    def subject(name: str) -> Subject:
        tool: Any = getattr(compression, name)()
        info = compression.CompressionInfo(key="", descriptor=None)
        return Subject(
            num_bytes=lambda data: len(data.buffer),
            encode=lambda x, _: tool.compress(x, info),
            decode=lambda data, _: tool.extract(data),
        )

    names = ("Float16Compression", "Uniform8BitQuantization", "BlockwiseQuantization")
    return {f"hivemind {name}": subject(name) for name in names}


def bitsandbytes_subjects() -> dict[str, Subject]:
    """bitsandbytes' blockwise formats, 8 and 4 bits; none where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    import bitsandbytes.functional as functional

    def size(data: Any) -> int:
        return int(data[0].numel() + data[1].absmax.numel() * 4)

    return {
        "bitsandbytes blockwise 8 bit": Subject(
            num_bytes=size,
            encode=lambda x, _: functional.quantize_blockwise(x, blocksize=256),
            decode=lambda data, _: functional.dequantize_blockwise(*data),
        ),
        "bitsandbytes nf4": Subject(
            num_bytes=size,
            encode=lambda x, _: functional.quantize_nf4(x.view(1, -1), blocksize=64),
            decode=lambda data, _: functional.dequantize_nf4(*data).view(-1),
        ),
    }


def gigabytes_per_s(work: Callable[[], object], numel: int, *, repeats: int) -> float:
    """Best rate of the fp32 side, after one call to warm up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return round(numel * 4 / best / 1e9, 2)


def relative_error(subject: Subject, x: Tensor, motion: Tensor) -> float:
    """‖decode(encode(x)) − x‖ / ‖x‖; the receiver is as far away as the motion."""
    near = x + motion.flip(0)
    return float((subject.decode(subject.encode(x, motion), near) - x).norm() / x.norm())


def measure(subject: Subject, vectors: Vectors, *, repeats: int) -> dict[str, float]:
    """All figures of one format."""
    x, motion = vectors.gaussian, vectors.motion
    near, data = x + motion.flip(0), subject.encode(x, motion)
    error = relative_error(subject, x, motion)
    data = subject.encode(x, motion)
    return {
        "bytes_per_parameter": round(subject.num_bytes(data) / x.numel(), 4),
        "error_gaussian": round(error, 5),
        "error_heavy_tailed": round(relative_error(subject, vectors.heavy_tailed, motion), 5),
        "error_of_motion": round(error / _MOTION, 4),
        "encode_GBps": gigabytes_per_s(lambda: subject.encode(x, motion), x.numel(), repeats=repeats),
        "decode_GBps": gigabytes_per_s(lambda: subject.decode(data, near), x.numel(), repeats=repeats),
    }


def subjects(numel: int, *, compiles: bool) -> dict[str, Subject]:
    """Everything that is compared, by name."""
    result = {}
    for name in dict.fromkeys(DELTA_CODECS + SLOW_CODECS):
        result[name] = own(name, numel=numel, compiled=False)
        if name in ("q8", "q4"):
            result[f"{name} stochastic"] = own(name, numel=numel, compiled=False, stochastic=True)
        if compiles and name in ("q8", "q4", "e3m0", "topk", "lattice"):
            result[f"{name} compiled"] = own(name, numel=numel, compiled=True)
        if compiles and name in ("q8", "q4"):
            result[f"{name} stochastic compiled"] = own(name, numel=numel, compiled=True, stochastic=True)
    return result | hivemind_subjects() | bitsandbytes_subjects()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--numel", type=int, default=1 << 22)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled routes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # deprecations inside torch and the libraries compared
    vectors, result = Vectors.draw(arguments.numel), {}
    print(f"{'format':32} B/param   encode   decode GB/s  error: Gaussian  heavy tail  of motion")
    for name, subject in subjects(arguments.numel, compiles=not arguments.no_compile and compiler_works()).items():
        result[name] = row = measure(subject, vectors, repeats=arguments.repeats)
        print(
            f"{name:32} {row['bytes_per_parameter']:7.3f} {row['encode_GBps']:8.2f} {row['decode_GBps']:8.2f}"
            f" {row['error_gaussian']:20.5f} {row['error_heavy_tailed']:11.5f} {row['error_of_motion']:10.3f}",
            flush=True,
        )
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
