import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from averaging.codec import Codec, codec_named, payload_tensor
from kernels.formats import Q8
from protocol.errors import ProtocolError

CPU = torch.device("cpu")
TOLERANCE = {"fp32": 0.0, "bf16": 2**-8, "q8": Q8.tolerance}


@pytest.fixture(params=["fp32", "bf16", "q8"])
def codec(request: pytest.FixtureRequest) -> Codec:
    return codec_named(request.param)


def vector(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def encoded(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    payload = torch.empty(codec.num_bytes(x.numel()), dtype=torch.uint8)
    codec.encode(x, payload)
    return payload


@pytest.mark.parametrize("numel", [1, 256, 1000])
def test_round_trip_is_within_the_formats_error(codec: Codec, numel: int) -> None:
    x, out = vector(numel), torch.empty(numel)
    codec.decode(encoded(codec, x), out)
    assert (out - x).abs().max() <= TOLERANCE[codec.name] * x.abs().max()
    assert torch.equal(out, x) == (not codec.lossy)


def test_byte_counts() -> None:
    assert [codec_named(name).num_bytes(1000) for name in ("fp32", "bf16", "q8")] == [4000, 2000, 4 * 258]


def test_slices_equal_the_whole(codec: Codec) -> None:
    x, pieces, out = vector(1000), torch.zeros(codec.num_bytes(1000), dtype=torch.uint8), torch.empty(1000)
    for start, stop in ((512, 1000), (0, 512)):
        codec.encode(x[start:stop], pieces, start=start)
    assert torch.equal(pieces, encoded(codec, x))
    for start, stop in ((0, 256), (256, 1000)):
        codec.decode(pieces, out[start:stop], start=start)
    whole = torch.empty(1000)
    codec.decode(pieces, whole)
    assert torch.equal(out, whole)


def test_decode_add_weighs(codec: Codec) -> None:
    payload, base, value = encoded(codec, vector(600)), vector(600, seed=1), torch.empty(600)
    codec.decode(payload, value)
    out = base.clone()
    codec.decode_add(payload, out, weight=0.25)
    torch.testing.assert_close(out, base + 0.25 * value)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown codec 'zip'"):
        codec_named("zip")


@pytest.mark.parametrize("size", [0, 7, 9])
def test_wrong_lengths_are_the_partners_fault(size: int) -> None:
    with pytest.raises(ProtocolError, match="8 were due"):
        payload_tensor(bytes(size), num_bytes=8, device=CPU)


def test_received_bytes_are_not_copied_when_writable_and_never_written_when_not() -> None:
    data = bytearray(range(8))
    shared = payload_tensor(memoryview(data), num_bytes=8, device=CPU)
    data[0] = 99
    assert shared[0] == 99
    frozen = bytes(8)
    payload_tensor(frozen, num_bytes=8, device=CPU).fill_(1)
    assert frozen == bytes(8)


def test_empty_payload() -> None:
    assert payload_tensor(b"", num_bytes=0, device=CPU).numel() == 0


@given(data=st.binary(min_size=516, max_size=516))
def test_any_bytes_of_the_right_length_decode(data: bytes) -> None:
    """The decoder is total: every value of the right length gives 300 numbers, finite or not."""
    out = torch.empty(300)
    codec_named("q8").decode(payload_tensor(data, num_bytes=516, device=CPU), out)
    assert out.shape == (300,)
