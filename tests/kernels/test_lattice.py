"""The lattice, against whole numbers of any size in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.dispatch import compiler_works
from kernels.formats import LATTICE
from kernels.lattice import lattice_decode, lattice_encode, lattice_fields
from tests.kernels.samples import TILE, gradient_like

SIZES = [1, 255, 256, 257, 5000, TILE, TILE + 1, 2 * TILE + 777]


def normal(numel: int, scale: float, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale


def steps_of(payload: Tensor) -> Tensor:
    return lattice_fields(payload)[0].float().flatten()


def encoded(x: Tensor, motion: Tensor | None, *, compiled: bool = False) -> Tensor:
    payload = torch.full((LATTICE.num_bytes(x.numel()),), 0xA5, dtype=torch.uint8)
    lattice_encode(x, out=payload, motion=motion, compiled=compiled)
    return payload


def decoded(payload: Tensor, near: Tensor, *, compiled: bool = False) -> tuple[Tensor, int]:
    out = torch.full_like(near, torch.nan)
    return out, lattice_decode(payload, out, near=near, compiled=compiled)


def steps_per_value(payload: Tensor, numel: int) -> Tensor:
    return steps_of(payload).repeat_interleave(256)[:numel]


@pytest.mark.parametrize("numel", SIZES)
def test_a_near_receiver_gets_the_senders_lattice_points(numel: int) -> None:
    x, motion = normal(numel, 0.02), normal(numel, 1e-4, seed=1)
    payload = encoded(x, motion)
    step = steps_per_value(payload, numel)
    exact = x.double().numpy() / step.double().numpy()
    near = x + step * normal(numel, 1.0, seed=2).clamp(-6.5, 6.5)
    values, unreadable = decoded(payload, near)
    assert unreadable == 0
    points = values.double().numpy() / step.double().numpy()
    assert np.abs(points - np.round(points)).max() < 1e-3
    assert np.abs(points - exact).max() < 0.5 + 1e-3
    assert ((values - x).abs() <= LATTICE.tolerance * step).all()


def test_everybody_near_decodes_the_same_values() -> None:
    x, motion = normal(3000, 0.02), normal(3000, 1e-4, seed=1)
    payload = encoded(x, motion)
    own, unreadable = decoded(payload, x)
    assert unreadable == 0
    for seed in range(2, 6):
        values, unreadable = decoded(payload, x + normal(3000, 5e-5, seed=seed))
        assert unreadable == 0
        assert torch.equal(values, own)


def test_the_step_follows_the_motion() -> None:
    x, motion = normal(2560, 0.02), normal(2560, 1e-4, seed=1)
    rms = motion.view(-1, 256).square().mean(dim=1).sqrt()
    torch.testing.assert_close(steps_of(encoded(x, motion)), 5 * rms / 8, rtol=0.01, atol=0.0)
    torch.testing.assert_close(steps_of(encoded(x, 10 * motion)), 50 * rms / 8, rtol=0.01, atol=0.0)


def test_without_motion_the_step_is_as_fine_as_fp32_allows() -> None:
    x = normal(512, 0.02)
    payload = encoded(x, torch.zeros(512))
    values, unreadable = decoded(payload, x)
    assert unreadable == 0
    assert (values - x).abs().max() <= 2.0**-20 * x.abs().max()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5e-4, 1e-40, 1e37])
def test_constants_zeros_and_denormals(value: float) -> None:
    x = torch.full((600,), value)
    for motion in (torch.zeros(600), x, torch.full((600,), 1e-40), torch.full((600,), 1e-3)):
        payload = encoded(x, motion)
        values, unreadable = decoded(payload, x)
        assert unreadable == 0
        assert ((values - x).abs() <= LATTICE.tolerance * steps_per_value(payload, 600)).all()


def test_motion_and_near_default_to_a_start_at_zero() -> None:
    x = normal(1000, 0.02)
    payload, out = encoded(x, None), torch.empty(1000)
    assert lattice_decode(payload, out) == 0
    assert torch.equal(out, decoded(payload, torch.zeros(1000))[0])
    assert (out - x).norm() < 0.25 * x.norm()


def test_far_blocks_are_counted_and_left_alone() -> None:
    x, motion = normal(1024, 0.02), normal(1024, 1e-4, seed=1)
    near = x.clone()
    near[300] += 0.01
    near[800:] += 0.02
    values, unreadable = decoded(encoded(x, motion), near)
    assert unreadable == 2
    assert torch.equal(values[256:512], near[256:512])
    assert torch.equal(values[768:], near[768:])
    assert (values[:256] - x[:256]).abs().max() < 1e-4
    assert (values[512:768] - x[512:768]).abs().max() < 1e-4


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, -1), (-1, -1), (3, -2)])
def test_two_wrapped_values_never_cancel(first: int, second: int) -> None:
    """A plain sum of the coordinates would not see two values that wrapped in opposite directions."""
    x, motion = normal(256, 0.02), normal(256, 1e-4, seed=1)
    payload = encoded(x, motion)
    window = 16 * float(steps_of(payload)[0])
    for other in range(1, 256):
        near = x.clone()
        near[0] += first * window
        near[other] += second * window
        assert decoded(payload, near)[1] == 1


def test_misses_of_the_checksum_are_as_rare_as_sixteen_bits_promise() -> None:
    x, motion = normal(256 * 4000, 0.02), normal(256 * 4000, 1e-4, seed=1)
    _, unreadable = decoded(encoded(x, motion), x + normal(256 * 4000, 1e-3, seed=2))
    assert unreadable >= 3998


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "motion", "near"])
def test_a_block_that_is_not_finite_is_unreadable(bad: float, where: str) -> None:
    vectors = {"x": normal(768, 0.02), "motion": normal(768, 1e-4, seed=1), "near": normal(768, 0.02)}
    vectors[where][300] = bad
    values, unreadable = decoded(encoded(vectors["x"], vectors["motion"]), vectors["near"])
    assert unreadable == 1
    assert torch.equal(values[256:512].nan_to_num(), vectors["near"][256:512].nan_to_num())
    assert values[:256].isfinite().all()
    assert values[512:].isfinite().all()


@pytest.mark.parametrize("step", [0.0, -1e-4, 1e-40, torch.nan, torch.inf])
def test_a_senseless_step_is_unreadable(step: float) -> None:
    x = normal(256, 0.02)
    payload = encoded(x, normal(256, 1e-4, seed=1))
    payload[:2] = torch.tensor([step]).bfloat16().view(torch.uint8)
    values, unreadable = decoded(payload, x)
    assert unreadable == 1
    assert torch.equal(values, x)


@given(data=st.binary(min_size=264, max_size=264))
def test_any_bytes_give_values_or_our_own(data: bytes) -> None:
    near = normal(300, 0.02)
    values, unreadable = decoded(torch.frombuffer(bytearray(data), dtype=torch.uint8), near)
    assert 0 <= unreadable <= 2
    assert not values.isnan().any()


def test_slices_equal_the_whole() -> None:
    numel = 2000
    x, motion, near = normal(numel, 0.02), normal(numel, 1e-4, seed=1), normal(numel, 0.02) + 1e-5
    pieces, out = torch.zeros(LATTICE.num_bytes(numel), dtype=torch.uint8), torch.empty(numel)
    for start, stop in [(1024, numel), (0, 1024)]:
        lattice_encode(x[start:stop], out=pieces, motion=motion[start:stop], start=start)
    assert torch.equal(pieces, encoded(x, motion))
    for start, stop in [(512, numel), (0, 512)]:
        lattice_decode(pieces, out[start:stop], near=near[start:stop], start=start)
    assert torch.equal(out, decoded(pieces, near)[0])


def test_inputs_survive_and_given_scratch_changes_nothing() -> None:
    numel = TILE + 300
    vectors = normal(numel, 0.02), normal(numel, 1e-4, seed=1), normal(numel, 0.02)
    before = [vector.clone() for vector in vectors]
    x, motion, near = vectors
    payload = torch.empty(LATTICE.num_bytes(numel), dtype=torch.uint8)
    lattice_encode(x, out=payload, motion=motion, scratch=torch.full((TILE,), torch.nan))
    assert torch.equal(payload, encoded(x, motion))
    decoded(payload, near)
    assert all(torch.equal(vector, old) for vector, old in zip(vectors, before, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # torch.compile's own deprecations
@pytest.mark.parametrize("numel", [256, 5000, TILE * 2 + 777])
def test_compiled_route_is_bit_identical(numel: int) -> None:
    if not compiler_works():
        pytest.skip("no working C++ compiler for torch.compile")
    for seed in range(3):
        x, motion = normal(numel, 0.02, seed), gradient_like(numel, seed)
        near = x + normal(numel, 2e-4, seed + 7)
        payload = encoded(x, motion)
        assert torch.equal(encoded(x, motion, compiled=True), payload)
        for candidate in (x, near):
            eager, fused = decoded(payload, candidate), decoded(payload, candidate, compiled=True)
            assert torch.equal(eager[0], fused[0])
            assert eager[1] == fused[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("numel", SIZES)
def test_gpu_gives_the_cpu_bytes_and_values(numel: int) -> None:
    x, motion = normal(numel, 0.02), normal(numel, 1e-4, seed=1)
    payload = torch.empty(LATTICE.num_bytes(numel), dtype=torch.uint8, device="cuda")
    lattice_encode(x.cuda(), out=payload, motion=motion.cuda())
    assert torch.equal(payload.cpu(), encoded(x, motion))
    out = torch.empty(numel, device="cuda")
    assert lattice_decode(payload, out, near=x.cuda()) == 0
    assert torch.equal(out.cpu(), decoded(payload.cpu(), x)[0])
