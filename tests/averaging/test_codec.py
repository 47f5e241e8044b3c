import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from averaging.codec import DELTA_CODECS, SLOW_CODECS, Codec, codec_named, payload_tensor
from kernels.formats import E3M0, Q4, Q8
from protocol.errors import ProtocolError

CPU = torch.device("cpu")
NAMES = list(dict.fromkeys(DELTA_CODECS + SLOW_CODECS))
TOLERANCE = {
    "fp32": 0.0,
    "bf16": 2**-8,
    "q8": Q8.tolerance,
    "q4": Q4.tolerance,
    "e3m0": E3M0.tolerance,
    "topk": 1.0,
    "lattice": 1e-4,  # against a motion of 1e-4 of the weights
}


@pytest.fixture(params=NAMES)
def codec(request: pytest.FixtureRequest) -> Codec:
    return codec_named(request.param)


def vector(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def encoded(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    payload = torch.empty(codec.num_bytes(x.numel()), dtype=torch.uint8)
    codec.encode(x, payload, motion=x * 1e-4)
    return payload


@pytest.mark.parametrize("numel", [1, 256, 1000, 5000])
def test_round_trip_is_within_the_formats_error(codec: Codec, numel: int) -> None:
    x, out = vector(numel), torch.empty(numel)
    assert codec.decode(encoded(codec, x), out, near=x) == 0
    assert (out - x).abs().max() <= TOLERANCE[codec.name] * x.abs().max()
    assert torch.equal(out, x) == (not codec.lossy)


def test_names_and_blocks(codec: Codec) -> None:
    assert codec_named(codec.name).name == codec.name
    assert 4096 % codec.block == 0
    assert codec.num_bytes(0) == 0


def test_byte_counts() -> None:
    sizes = {name: codec_named(name).num_bytes(5000) for name in NAMES}
    assert sizes == {
        "fp32": 20000,
        "bf16": 10000,
        "q8": 20 * 258,
        "q4": 79 * 34,
        "e3m0": 79 * 34,
        "topk": 2 * 116,
        "lattice": 20 * 132,
    }


def test_slices_equal_the_whole(codec: Codec) -> None:
    numel, motion = 9000, vector(9000, seed=2) * 1e-4
    x, pieces, out = vector(numel), torch.zeros(codec.num_bytes(numel), dtype=torch.uint8), torch.empty(numel)
    for start, stop in ((8192, numel), (4096, 8192), (0, 4096)):
        codec.encode(x[start:stop], pieces, start=start, motion=motion[start:stop])
    whole = torch.zeros_like(pieces)
    codec.encode(x, whole, motion=motion)
    assert torch.equal(pieces, whole)
    for start, stop in ((0, 4096), (4096, numel)):
        codec.decode(pieces, out[start:stop], start=start, near=x[start:stop])
    expected = torch.empty(numel)
    codec.decode(whole, expected, near=x)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("has_scratch", [False, True])
def test_decode_add_weighs(codec: Codec, has_scratch: bool) -> None:
    x = vector(600)
    payload, base, value = encoded(codec, x), vector(600, seed=1), torch.empty(600)
    codec.decode(payload, value, near=x)
    out = base.clone()
    scratch = torch.full((1000,), torch.nan) if has_scratch else None
    assert codec.decode_add(payload, out, weight=0.25, near=x, scratch=scratch) == 0
    torch.testing.assert_close(out, base + 0.25 * value)


@pytest.mark.parametrize("name", [name for name in DELTA_CODECS if name != "fp32"])
def test_error_feedback_loses_nothing(name: str) -> None:
    """What was sent plus the carried error is the sum of what should have been sent."""
    codec, generator = codec_named(name), torch.Generator().manual_seed(3)
    residual, sent, total = torch.zeros(700), torch.zeros(700, dtype=torch.float64), torch.zeros(700).double()
    value = torch.empty(700)
    for _ in range(50):
        delta = torch.randn(700, generator=generator) * 1e-3
        residual += delta
        codec.decode(encoded(codec, residual), value)
        residual -= value
        sent += value.double()
        total += delta.double()
    torch.testing.assert_close(sent + residual.double(), total, rtol=0, atol=2e-8)
    assert residual.norm() < (0.9 if name == "topk" else 0.3) * total.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_input_is_never_made_plausible(codec: Codec, bad: float) -> None:
    x, out = vector(5000), torch.empty(5000)
    x[4500] = bad
    near = vector(5000)
    unreadable = codec.decode(encoded(codec, x), out, near=near)
    assert unreadable == 1 or not out.isfinite().all()


def test_lattice_reports_what_it_could_not_read() -> None:
    codec, x, out = codec_named("lattice"), vector(600), torch.empty(600)
    far = x.clone()
    far[:256] += 1
    payload = encoded(codec, x)
    assert codec.decode(payload, out, near=far) == 1
    assert torch.equal(out[:256], far[:256])
    total = torch.zeros(600)
    assert codec.decode_add(payload, total, weight=1.0, near=far) == 1
    assert torch.equal(total, out)


@pytest.mark.parametrize("name", ["q8", "q4"])
def test_stochastic_rounding_depends_on_the_seed_alone(name: str) -> None:
    codec, x = codec_named(name, rounding="stochastic"), vector(600)
    payloads = [torch.empty(codec.num_bytes(600), dtype=torch.uint8) for _ in range(3)]
    for payload, seed in zip(payloads, (1, 1, 2), strict=True):
        codec.encode(x, payload, seed=seed)
    assert torch.equal(payloads[0], payloads[1])
    assert not torch.equal(payloads[0], payloads[2])
    out = torch.empty(600)
    codec_named(name).decode(payloads[0], out)  # receivers need not know
    assert (out - x).abs().max() <= 2.1 * TOLERANCE[name] * x.abs().max()


@pytest.mark.parametrize("name", ["fp32", "topk", "e3m0", "lattice"])
def test_stochastic_rounding_where_there_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="use q8 or q4"):
        codec_named(name, rounding="stochastic")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown codec 'zip'; known are fp32, bf16, q8, q4, e3m0, topk, lattice"):
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


@given(data=st.data())
def test_any_bytes_of_the_right_length_decode(data: st.DataObject) -> None:
    """The decoder is total: every value of the right length gives 300 numbers, finite or not."""
    codec = codec_named(data.draw(st.sampled_from(NAMES)))
    num_bytes = codec.num_bytes(300)
    payload = payload_tensor(
        data.draw(st.binary(min_size=num_bytes, max_size=num_bytes)), num_bytes=num_bytes, device=CPU
    )
    first, second = torch.empty(300), torch.zeros(300)
    codec.decode(payload, first)
    codec.decode_add(payload, second, weight=1.0)
    assert torch.equal(first.nan_to_num(), second.nan_to_num())
