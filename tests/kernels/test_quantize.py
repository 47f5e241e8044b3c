"""The formats with a scale and a small code per value: q8, q4 and e3m0."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import quantize
from kernels.dispatch import compiler_works
from kernels.formats import E3M0, Q4, Q8, BlockFormat
from kernels.powers import e3m0_decode_reference, e3m0_encode_reference
from tests.kernels.samples import SIZES, TILE, block_maxima, decoded, encoded, gradient_like


@pytest.fixture(params=[Q8, Q4, E3M0], ids=lambda block_format: block_format.name)
def block_format(request: pytest.FixtureRequest) -> BlockFormat:
    assert isinstance(request.param, BlockFormat)
    return request.param


def reference_encoded(x: Tensor, block_format: BlockFormat) -> Tensor:
    return e3m0_encode_reference(x) if block_format == E3M0 else quantize.encode_reference(x, block_format)


def reference_decoded(payload: Tensor, numel: int, block_format: BlockFormat) -> Tensor:
    if block_format == E3M0:
        return e3m0_decode_reference(payload, numel)
    return quantize.decode_reference(payload, numel, block_format)


@pytest.mark.parametrize("numel", SIZES)
def test_tiled_kernels_give_the_references_bytes_and_values(block_format: BlockFormat, numel: int) -> None:
    x = gradient_like(numel)
    payload = encoded(x, block_format)
    assert torch.equal(payload, reference_encoded(x, block_format))
    assert torch.equal(decoded(payload, numel, block_format), reference_decoded(payload, numel, block_format))


@pytest.mark.parametrize("numel", SIZES)
def test_error_stays_within_the_formats_tolerance(block_format: BlockFormat, numel: int) -> None:
    x = gradient_like(numel)
    error = decoded(encoded(x, block_format), numel, block_format) - x
    bound = block_maxima(x, block_format) * block_format.tolerance * (1 + 1e-5)
    assert (block_maxima(error, block_format) <= bound).all()


def test_q8_matches_an_independent_float64_computation() -> None:
    x = gradient_like(1024)
    payload = encoded(x, Q8).numpy()
    scales = (payload[:8].view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    codes = payload[8:].view(np.int8).reshape(4, 256)
    exact = x.double().numpy().reshape(4, 256) / scales[:, None]
    assert np.abs(codes - exact).max() <= 0.5 + 1e-5
    assert np.array_equal(decoded(encoded(x, Q8), 1024, Q8).double().numpy(), (codes * scales[:, None]).reshape(-1))


def test_q4_codes_lie_in_halves_of_the_block() -> None:
    x = torch.zeros(64)
    x[0], x[32], x[1] = 7.0, -7.0, 3.0
    payload = encoded(x, Q4)
    assert payload[:4].tolist() == [0x80, 0x3F, 14 | 0 << 4, 10 | 7 << 4]  # scale 1.0, then codes + 7


def test_e3m0_keeps_its_own_levels() -> None:
    levels = torch.tensor([0.0] + [2.0**-e for e in range(7)])
    x = torch.cat([levels, -levels]).repeat(4) * 0.9 * 2.0**-6
    x[0] = 2.0**-6  # the largest value sets the scale; 0.9 times it is the largest level
    values = decoded(encoded(x, E3M0), 64, E3M0)
    torch.testing.assert_close(values[1:], x[1:], rtol=2**-8, atol=0.0)


@pytest.mark.parametrize("value", [1.0, -3.5e-4, 1e-30, 3.0e38])
def test_constant_blocks(block_format: BlockFormat, value: float) -> None:
    x = torch.full((600,), value)
    values = decoded(encoded(x, block_format), 600, block_format)
    assert torch.allclose(values, x, rtol=block_format.tolerance, atol=0.0)


@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_blocks_of_zeros_or_denormals_become_zero(block_format: BlockFormat, value: float) -> None:
    assert torch.equal(decoded(encoded(torch.full((300,), value), block_format), 300, block_format), torch.zeros(300))


def test_one_outlier_does_not_touch_other_blocks(block_format: BlockFormat) -> None:
    x = torch.full((512,), 1e-4)
    x[0] = 1e4
    values = decoded(encoded(x, block_format), 512, block_format)
    assert torch.allclose(values[256:], x[256:], rtol=block_format.tolerance)
    assert values[0] == pytest.approx(1e4, rel=block_format.tolerance)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_non_finite_and_in_their_block(block_format: BlockFormat, bad: float) -> None:
    x = gradient_like(768)
    x[300] = bad
    values = decoded(encoded(x, block_format), 768, block_format)
    assert not values[256:512].isfinite().all()
    assert values[:256].isfinite().all()
    assert values[512:].isfinite().all()


def test_slices_make_the_same_payload_and_values_as_the_whole(block_format: BlockFormat) -> None:
    numel = 2000
    x = gradient_like(numel)
    payload = torch.empty(block_format.num_bytes(numel), dtype=torch.uint8)
    out = torch.empty(numel)
    for start, stop in [(1024, numel), (0, 512), (512, 1024)]:
        quantize.encode(x[start:stop], block_format, out=payload, start=start)
    for start, stop in [(512, 1024), (1024, numel), (0, 512)]:
        quantize.decode(payload, out[start:stop], block_format, start=start)
    assert torch.equal(payload, encoded(x, block_format))
    assert torch.equal(out, decoded(payload, numel, block_format))


def test_misplaced_slices_are_refused() -> None:
    payload = torch.empty(Q8.num_bytes(1000), dtype=torch.uint8)
    with pytest.raises(AssertionError, match="multiple of 256"):
        quantize.encode(torch.zeros(256), Q8, out=payload, start=100)
    with pytest.raises(AssertionError, match="only the last block"):
        quantize.encode(torch.zeros(100), Q8, out=payload, start=256)
    with pytest.raises(AssertionError, match="beyond"):
        quantize.decode(payload, torch.zeros(512), Q8, start=768)
    with pytest.raises(AssertionError, match="whole blocks"):
        quantize.decode(payload[:-1], torch.zeros(512), Q8)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("weight", [1.0, 1 / 3])
def test_decode_add_accumulates_weighted_values(block_format: BlockFormat, numel: int, weight: float) -> None:
    payload, base = encoded(gradient_like(numel), block_format), gradient_like(numel, seed=1)
    out = base.clone()
    quantize.decode_add(payload, out, block_format, weight=weight)
    expected = base.double() + weight * reference_decoded(payload, numel, block_format).double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-8)


def test_given_scratch_changes_nothing_and_input_survives(block_format: BlockFormat) -> None:
    x = gradient_like(TILE + 300)
    before = x.clone()
    payload = torch.empty(block_format.num_bytes(x.numel()), dtype=torch.uint8)
    quantize.encode(x, block_format, out=payload, scratch=torch.full((TILE,), torch.nan))
    assert torch.equal(payload, encoded(x, block_format))
    assert torch.equal(x, before)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # torch.compile's own deprecations
@pytest.mark.parametrize("numel", [256, 5000, TILE * 2 + 777])
def test_compiled_route_is_bit_identical(block_format: BlockFormat, numel: int) -> None:
    if not compiler_works():
        pytest.skip("no working C++ compiler for torch.compile")
    for seed in range(3):
        x = gradient_like(numel, seed)
        payload = encoded(x, block_format)
        assert torch.equal(encoded(x, block_format, compiled=True), payload)
        assert torch.equal(decoded(payload, numel, block_format, compiled=True), decoded(payload, numel, block_format))
        for weight in (1.0, 1 / 3, 0.123):
            eager, fused = x.clone(), x.clone()
            quantize.decode_add(payload, eager, block_format, weight=weight)
            quantize.decode_add(payload, fused, block_format, weight=weight, compiled=True)
            assert torch.equal(eager, fused)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("seed", [None, 3])
def test_gpu_gives_the_cpu_bytes_and_values(block_format: BlockFormat, numel: int, seed: int | None) -> None:
    x = gradient_like(numel)
    seed = None if block_format == E3M0 else seed
    payload = torch.empty(block_format.num_bytes(numel), dtype=torch.uint8, device="cuda")
    quantize.encode(x.cuda(), block_format, out=payload, seed=seed)
    assert torch.equal(payload.cpu(), encoded(x, block_format, seed=seed))
    out = torch.empty(numel, device="cuda")
    quantize.decode(payload, out, block_format)
    assert torch.equal(out.cpu(), decoded(payload.cpu(), numel, block_format))
