import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.dispatch import compiler_works, tile_numel
from kernels.formats import Q8
from kernels.quantize import (
    q8_decode,
    q8_decode_add,
    q8_decode_reference,
    q8_encode,
    q8_encode_reference,
    q8_num_bytes,
)

TILE = tile_numel(torch.device("cpu"))
SIZES = [1, 255, 256, 257, 5000, TILE, TILE + 1, 2 * TILE + 777]


def gradient_like(numel: int, seed: int = 0) -> Tensor:
    """Values over many magnitudes, some exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * 10 ** (torch.rand(numel, generator=generator) * 6 - 7)
    return x * (torch.rand(numel, generator=generator) > 0.1)


def encoded(x: Tensor, *, compiled: bool = False) -> Tensor:
    payload = torch.full((q8_num_bytes(x.numel()),), 0xA5, dtype=torch.uint8)  # stale bytes must all be overwritten
    q8_encode(x, out=payload, compiled=compiled)
    return payload


def decoded(payload: Tensor, numel: int, *, compiled: bool = False) -> Tensor:
    out = torch.full((numel,), torch.nan)
    q8_decode(payload, out, compiled=compiled)
    return out


@pytest.mark.parametrize("numel", SIZES)
def test_tiled_encode_gives_the_reference_bytes(numel: int) -> None:
    x = gradient_like(numel)
    assert torch.equal(encoded(x), q8_encode_reference(x))


@pytest.mark.parametrize("numel", SIZES)
def test_tiled_decode_gives_the_reference_values(numel: int) -> None:
    payload = encoded(gradient_like(numel))
    assert torch.equal(decoded(payload, numel), q8_decode_reference(payload, numel))


@pytest.mark.parametrize("numel", SIZES)
def test_error_stays_within_the_formats_tolerance(numel: int) -> None:
    x = gradient_like(numel)
    padded = np.zeros((Q8.num_blocks(numel), Q8.block_size))
    error = padded.copy()
    padded.reshape(-1)[:numel] = x.double().numpy()
    error.reshape(-1)[:numel] = decoded(encoded(x), numel).double().numpy() - x.double().numpy()
    bound = np.abs(padded).max(axis=1) * Q8.tolerance * (1 + 1e-5)
    assert (np.abs(error).max(axis=1) <= bound).all()


def test_values_match_an_independent_float64_computation() -> None:
    x = gradient_like(1024)
    payload = encoded(x).numpy()
    scales = (payload[:8].view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    codes = payload[8:].view(np.int8).reshape(4, 256)
    exact = x.double().numpy().reshape(4, 256) / scales[:, None]
    assert np.abs(codes - exact).max() <= 0.5 + 1e-5
    assert np.array_equal(decoded(encoded(x), 1024).double().numpy(), (codes * scales[:, None]).reshape(-1))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5e-4, 1e-30, 3.0e38])
def test_constant_blocks(value: float) -> None:
    x = torch.full((600,), value)
    assert torch.allclose(decoded(encoded(x), 600), x, rtol=Q8.tolerance, atol=0.0)


def test_blocks_of_denormals_become_zero() -> None:
    x = torch.full((256,), 1e-40)
    assert torch.equal(decoded(encoded(x), 256), torch.zeros(256))


def test_one_outlier_does_not_touch_other_blocks() -> None:
    x = torch.full((512,), 1e-4)
    x[0] = 1e4
    values = decoded(encoded(x), 512)
    assert torch.allclose(values[256:], x[256:], rtol=Q8.tolerance)
    assert values[0] == pytest.approx(1e4, rel=Q8.tolerance)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_non_finite_and_in_their_block(bad: float) -> None:
    x = gradient_like(768)
    x[300] = bad
    values = decoded(encoded(x), 768)
    assert not values[256:512].isfinite().all()
    assert values[:256].isfinite().all()
    assert values[512:].isfinite().all()


def test_slices_make_the_same_payload_and_values_as_the_whole() -> None:
    numel = 2000
    x = gradient_like(numel)
    payload = torch.empty(q8_num_bytes(numel), dtype=torch.uint8)
    out = torch.empty(numel)
    for start, stop in [(1024, numel), (0, 512), (512, 1024)]:
        q8_encode(x[start:stop], out=payload, start=start)
    for start, stop in [(512, 1024), (1024, numel), (0, 512)]:
        q8_decode(payload, out[start:stop], start=start)
    assert torch.equal(payload, encoded(x))
    assert torch.equal(out, decoded(payload, numel))


def test_misplaced_slices_are_refused() -> None:
    payload = torch.empty(q8_num_bytes(1000), dtype=torch.uint8)
    with pytest.raises(AssertionError, match="multiple of 256"):
        q8_encode(torch.zeros(256), out=payload, start=100)
    with pytest.raises(AssertionError, match="only the last block"):
        q8_encode(torch.zeros(100), out=payload, start=256)
    with pytest.raises(AssertionError, match="beyond"):
        q8_decode(payload, torch.zeros(512), start=768)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("weight", [1.0, 0.5, 1 / 3])
def test_decode_add_accumulates_weighted_values(numel: int, weight: float) -> None:
    payload, base = encoded(gradient_like(numel)), gradient_like(numel, seed=1)
    out = base.clone()
    q8_decode_add(payload, out, weight=weight)
    expected = base.double() + weight * q8_decode_reference(payload, numel).double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-8)


def test_given_scratch_changes_nothing_and_input_survives() -> None:
    x = gradient_like(TILE + 300)
    before = x.clone()
    payload = torch.empty(q8_num_bytes(x.numel()), dtype=torch.uint8)
    q8_encode(x, out=payload, scratch=torch.full((TILE,), torch.nan))
    assert torch.equal(payload, encoded(x))
    assert torch.equal(x, before)


def test_error_feedback_loses_nothing() -> None:
    """What was sent plus the carried error is the sum of what should have been sent."""
    generator = torch.Generator().manual_seed(3)
    residual, sent, total = torch.zeros(700), torch.zeros(700, dtype=torch.float64), torch.zeros(700).double()
    for _ in range(50):
        delta = torch.randn(700, generator=generator) * 1e-3
        residual += delta
        value = decoded(encoded(residual), 700)
        residual -= value
        sent += value.double()
        total += delta.double()
    torch.testing.assert_close(sent + residual.double(), total, rtol=0, atol=1e-8)
    assert residual.abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # torch.compile's own deprecations
@pytest.mark.parametrize("numel", [256, 5000, TILE * 2 + 777])
def test_compiled_route_is_bit_identical(numel: int) -> None:
    if not compiler_works():
        pytest.skip("no working C++ compiler for torch.compile")
    for seed in range(3):
        x = gradient_like(numel, seed)
        payload = encoded(x)
        assert torch.equal(encoded(x, compiled=True), payload)
        assert torch.equal(decoded(payload, numel, compiled=True), decoded(payload, numel))
        for weight in (1.0, 1 / 3, 0.123):
            eager, fused = x.clone(), x.clone()
            q8_decode_add(payload, eager, weight=weight)
            q8_decode_add(payload, fused, weight=weight, compiled=True)
            assert torch.equal(eager, fused)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("numel", SIZES)
def test_gpu_gives_the_cpu_bytes_and_values(numel: int) -> None:
    x = gradient_like(numel)
    payload = torch.empty(q8_num_bytes(numel), dtype=torch.uint8, device="cuda")
    q8_encode(x.cuda(), out=payload)
    assert torch.equal(payload.cpu(), encoded(x))
    out = torch.empty(numel, device="cuda")
    q8_decode(payload, out)
    assert torch.equal(out.cpu(), decoded(encoded(x), numel))
