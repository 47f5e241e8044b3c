"""Tensors to bytes and back, in the safetensors format.

The format is eight bytes of header length, a JSON header and the raw values. It is written and read here, in the order of the
names and without metadata of its own, for three reasons: equal weights give equal bytes (their hash is their name among peers),
a checkpoint is written piece by piece without a second copy in memory, and a stranger's bytes meet a cap on the
header before anything is parsed. The `safetensors` library reads what this writes, and the tests hold them together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError

__all__ = ["decode_tensors", "decode_weights", "encode_chunks", "encode_weights"]

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 8 << 20
_CHUNK_BYTES = 4 << 20

Buffer = bytes | bytearray | memoryview


def encode_chunks(tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> Iterator[Buffer]:
    """A safetensors file in pieces of at most 4 MiB, its tensors in the order of their names.

    Args:
        tensors: by name, on any device; they must not change until the iterator ends.
        metadata: the header's `__metadata__`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of eight, as readers that map the file expect
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(tensors):
        raw = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        for start in range(0, raw.size, _CHUNK_BYTES):
            yield raw[start : start + _CHUNK_BYTES].data


def encode_weights(weights: Mapping[str, Tensor]) -> bytes:
    """A safetensors file as bytes; equal weights give equal bytes."""
    return b"".join(encode_chunks(weights))


def decode_tensors(data: Buffer) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        data: the whole file; the returned tensors are copies.

    Raises:
        CheckpointError: a header that is too long, not JSON, or that does not describe exactly these bytes.
    """
    view = memoryview(data)
    header, values = _header(view)
    tensors: dict[str, Tensor] = {}
    expected_start = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        dtype, shape = _entry_type(entry)
        start, end = _offsets(entry)
        if start != expected_start or end - start != math.prod(shape) * dtype.itemsize or end > len(values):
            raise CheckpointError(f"weights: tensor {name[:64]!r} does not fit its place; fetch or save them again")
        expected_start = end
        tensors[name] = _tensor(values[start:end], dtype, shape)
    if expected_start != len(values):
        raise CheckpointError("weights: bytes are left over after the last tensor; fetch or save them again")
    return tensors


def decode_weights(data: Buffer, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read model weights from bytes that a stranger may have made.

    Args:
        data: a safetensors file.
        expected: shape of every tensor by name, from the manifest's model.

    Returns:
        fp32 tensors, exactly the expected ones, all finite.

    Raises:
        CheckpointError: other names, shapes or types, NaN or infinity, or a broken file.
    """
    num_values = sum(math.prod(shape) for shape in expected.values())
    if len(data) > 8 + _MAX_HEADER_BYTES + 4 * num_values:
        raise CheckpointError("weights: the file is longer than this model's weights; use weights of the same run")
    tensors = decode_tensors(data)
    if tensors.keys() != expected.keys():
        raise CheckpointError("weights: tensor names are not this model's; use weights of the same run")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != tuple(expected[name]):
            raise CheckpointError(
                f"weights: {name} has another shape or type than the model; use weights of the same run"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"weights: {name} has values that are not finite; use an earlier state")
    return tensors


def _header(view: memoryview) -> tuple[dict[str, Any], memoryview]:
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > min(_MAX_HEADER_BYTES, len(view) - 8):
        raise CheckpointError("weights: the file is cut off or its header is too long; fetch or save them again")
    try:
        header = json.loads(bytes(view[8 : 8 + length]))
    except (ValueError, RecursionError):
        raise CheckpointError("weights: the header can not be read; fetch or save them again") from None
    if not isinstance(header, dict):
        raise CheckpointError("weights: the header is not a table; fetch or save them again")
    header.pop("__metadata__", None)
    return header, view[8 + length :]


def _entry_type(entry: dict[str, Any]) -> tuple[torch.dtype, tuple[int, ...]]:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError("weights: a tensor has an unknown type; fetch or save them again")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_size(size) for size in shape):
        raise CheckpointError("weights: a tensor has an impossible shape; fetch or save them again")
    return _DTYPES[dtype], tuple(shape)


def _offsets(entry: object) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CheckpointError("weights: a tensor has no place in the file; fetch or save them again")
    return offsets[0], offsets[1]


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _tensor(raw: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(raw):
        return torch.empty(shape, dtype=dtype)
    flat = torch.empty(len(raw), dtype=torch.uint8)
    flat.numpy()[:] = raw
    return flat.view(dtype).view(shape)
