"""The safetensors codec, against the library as an oracle and against hostile bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import CheckpointError
from model.weights import decode_tensors, decode_weights, encode_chunks, encode_weights
from tests.model.shapes import small_model

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor(3, dtype=torch.int64),
    "c": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
    "turned": torch.arange(12, dtype=torch.float32).view(3, 4).t(),
}
WEIGHTS = {"x": torch.ones(3, 2), "y": torch.zeros(4)}
SHAPES = {"x": (3, 2), "y": (4,)}
PACKED = encode_weights(WEIGHTS)


def file_of(header: Any, values: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def test_the_library_reads_what_we_write() -> None:
    loaded = safetensors.torch.load(encode_weights(TENSORS))
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


def test_we_read_what_the_library_writes() -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    loaded = decode_tensors(safetensors.torch.save(contiguous, metadata={"format": "pt"}))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_equal_weights_give_equal_bytes_in_any_order() -> None:
    assert encode_weights(dict(reversed(TENSORS.items()))) == encode_weights(TENSORS)
    assert b"".join(encode_chunks(TENSORS)) == encode_weights(TENSORS)


def test_large_tensors_come_in_small_pieces() -> None:
    pieces = list(encode_chunks({"a": torch.zeros(5 << 20)}))
    assert max(len(piece) for piece in pieces) <= 4 << 20


def test_a_models_weights_round_trip() -> None:
    state = small_model().state_dict()
    decoded = decode_weights(encode_weights(state), {name: tuple(t.shape) for name, t in state.items()})
    assert all(torch.equal(decoded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_must_be_finite(bad: float) -> None:
    with pytest.raises(CheckpointError, match="finite"):
        decode_weights(encode_weights(WEIGHTS | {"y": torch.tensor([0, bad, 0, 0])}), SHAPES)


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": WEIGHTS["x"]},
        WEIGHTS | {"z": torch.ones(1)},
        WEIGHTS | {"x": torch.ones(2, 3)},
        WEIGHTS | {"x": torch.ones(3, 2, dtype=torch.float16)},
        WEIGHTS | {"x": torch.ones(3, 2, dtype=torch.int32)},
    ],
)
def test_weights_must_be_exactly_the_models(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match="same run"):
        decode_weights(encode_weights(tensors), SHAPES)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (1 << 62).to_bytes(8, "little") + b"{}",
        file_of(b"not json", b""),
        file_of(b"[" * 200_000, b""),
        file_of([], b""),
        file_of({"x": 1}, b""),
        file_of({"x": {}}, b""),
        file_of({"x": F32 | {"dtype": "F128"}}, b"\0" * 8),
        file_of({"x": F32 | {"dtype": ["F32"]}}, b"\0" * 8),
        file_of({"x": F32 | {"shape": [-2]}}, b"\0" * 8),
        file_of({"x": F32 | {"shape": [True, 2]}}, b"\0" * 8),
        file_of({"x": F32 | {"shape": [1] * 9}}, b"\0" * 8),
        file_of({"x": F32 | {"shape": [1 << 40, 1 << 40]}}, b"\0" * 8),
        file_of({"x": F32 | {"data_offsets": [0, 4]}}, b"\0" * 8),
        file_of({"x": F32 | {"data_offsets": [8, 0]}}, b"\0" * 8),
        file_of({"x": F32}, b"\0" * 4),
        file_of({"x": F32}, b"\0" * 12),
        file_of({"x": F32, "y": F32}, b"\0" * 8),
        file_of({"x": F32 | {"data_offsets": [4, 12]}}, b"\0" * 12),
    ],
)
def test_hostile_files_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        decode_tensors(data)


def test_a_file_longer_than_the_model_is_not_even_parsed() -> None:
    with pytest.raises(CheckpointError, match="longer"):
        decode_weights(bytes(9 << 20), SHAPES)


@given(st.integers(0, len(PACKED) - 1), st.integers(0, 255), st.integers(0, len(PACKED)))
@settings(max_examples=300, deadline=None)
def test_changed_bytes_never_do_more_than_raise(where: int, value: int, cut: int) -> None:
    changed = bytearray(PACKED)
    changed[where] = value
    for data in (bytes(changed), PACKED[:cut], PACKED[cut:], bytes(changed[:cut]) + PACKED):
        try:
            decoded = decode_weights(data, SHAPES)
        except CheckpointError:
            continue
        assert {name: tuple(t.shape) for name, t in decoded.items()} == SHAPES
