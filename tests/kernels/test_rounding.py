"""Stochastic rounding: the noise, and what it does in q8 and q4."""

import pytest
import torch

from kernels import quantize
from kernels.dispatch import compiler_works
from kernels.formats import Q4, Q8, BlockFormat
from kernels.rounding import noise, noise_key
from tests.kernels.samples import TILE, block_maxima, decoded, encoded, gradient_like

CPU = torch.device("cpu")


@pytest.fixture(params=[Q8, Q4], ids=lambda block_format: block_format.name)
def block_format(request: pytest.FixtureRequest) -> BlockFormat:
    assert isinstance(request.param, BlockFormat)
    return request.param


def test_noise_is_uniform_and_never_zero_or_one() -> None:
    values = noise(noise_key(1, 0, CPU), 1 << 18)
    assert 0 < values.min() < 2**-15
    assert 1 - 2**-15 < values.max() < 1
    counts = torch.histc(values, bins=64, min=0, max=1)
    chi_square = float(((counts - 4096) ** 2 / 4096).sum())
    assert 20 < chi_square < 130  # 63 degrees of freedom: mean 63, deviation 11


def test_noise_does_not_repeat_between_neighbours_or_seeds() -> None:
    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack((a, b)))[0, 1])

    values = noise(noise_key(1, 0, CPU), 1 << 16)
    limit = 5 / 2**8  # five deviations
    assert all(abs(correlation(values[lag:], values[:-lag])) < limit for lag in (1, 2, 64, 256))
    assert all(abs(correlation(values, noise(noise_key(seed, 0, CPU), 1 << 16))) < limit for seed in (0, 2, 3, -1))


def test_noise_belongs_to_the_position() -> None:
    whole = noise(noise_key(7, 0, CPU), 1000)
    assert torch.equal(noise(noise_key(7, 300, CPU), 700), whole[300:])
    assert noise(noise_key(7, (1 << 32) - 10, CPU), 20).isfinite().all()  # positions wrap


def test_rounding_is_unbiased_in_value(block_format: BlockFormat) -> None:
    x = torch.randn(512, generator=torch.Generator().manual_seed(0)) * 1e-3
    draws = torch.stack(
        [decoded(encoded(x, block_format, seed=seed), 512, block_format) for seed in range(1000)]
    ).double()
    step = torch.from_numpy(block_maxima(x, block_format)) / (127 if block_format == Q8 else 7) * (1 + 2**-6)
    step = step.repeat_interleave(block_format.block_size)[:512]
    deviation = step / 2 / 1000**0.5  # a value between two codes has a deviation of at most half a step
    bias = (draws.mean(dim=0) - x) / deviation
    assert bias.abs().max() < 5
    assert abs(float(bias.mean())) < 5 / 512**0.5
    assert (draws - x).abs().max(dim=0).values.le(step).all()


def test_nearest_rounding_has_the_bias_that_this_removes() -> None:
    x = torch.full((256,), 0.4)
    x[0] = 127.0
    assert decoded(encoded(x, Q8), 256, Q8)[1] == 0
    mean = sum(float(decoded(encoded(x, Q8, seed=seed), 256, Q8)[1:].mean()) for seed in range(20)) / 20
    assert mean == pytest.approx(0.4, abs=0.05)


def test_the_largest_value_never_wraps(block_format: BlockFormat) -> None:
    """The scale is rounded up, so that even the largest noise stays below the next code."""
    maxima = torch.rand(2000, generator=torch.Generator().manual_seed(0)) + 1
    x = maxima.repeat_interleave(block_format.block_size)
    x[::2] *= -1
    for seed in range(5):
        values = decoded(encoded(x, block_format, seed=seed), x.numel(), block_format)
        assert ((values - x).abs() <= x.abs() * (2.1 * block_format.tolerance)).all()


def test_non_finite_blocks_stay_non_finite(block_format: BlockFormat) -> None:
    x = gradient_like(512)
    x[300] = torch.nan
    values = decoded(encoded(x, block_format, seed=1), 512, block_format)
    assert values[:256].isfinite().all()
    assert not values[256:].isfinite().all()


def test_slices_and_tiles_give_the_bytes_of_the_whole(block_format: BlockFormat) -> None:
    numel = TILE + 1500
    x = gradient_like(numel)
    whole, pieces = encoded(x, block_format, seed=9), torch.zeros(block_format.num_bytes(numel), dtype=torch.uint8)
    for start, stop in [(1024, numel), (0, 1024)]:
        quantize.encode(x[start:stop], block_format, out=pieces, start=start, seed=9)
    assert torch.equal(pieces, whole)
    assert not torch.equal(encoded(x, block_format, seed=10), whole)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # torch.compile's own deprecations
def test_compiled_route_is_bit_identical(block_format: BlockFormat) -> None:
    if not compiler_works():
        pytest.skip("no working C++ compiler for torch.compile")
    for numel in (5000, TILE + 777):
        for seed in (0, 1, 1 << 40, -5):
            x = gradient_like(numel)
            assert torch.equal(encoded(x, block_format, seed=seed, compiled=True), encoded(x, block_format, seed=seed))
