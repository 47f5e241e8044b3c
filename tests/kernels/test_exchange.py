"""The passes in C do what torch does: the same bytes, the same values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from averaging.codec import codec_named
from kernels import exchange, native
from kernels.dispatch import COMPILE_MIN_NUMEL
from kernels.exchange import CODECS, Encoded, PieceVectors, Rule
from kernels.lattice import WINDOW, lattice_encode, lattice_fields
from tests.kernels.samples import gradient_like

pytestmark = pytest.mark.skipif(not exchange.is_available(), reason="no C compiler here")

NUMEL = 5 * 256 + 100
EMPTY = torch.empty(0)
NAMES = [name for name in CODECS if name]
UNIFORM = [name for name in NAMES if name != "lattice"]
RULE = Rule(
    algorithm="pair-average",
    alpha=0.5,
    beta=0.7,
    gamma=0.7,
    scale=1.0,
    clip=1.0,
    keep=1.0,
    error_decay=1.0,
    slow_is_theta=True,
    keeps_residual=False,
    own_factor=None,
)


SAMPLES = {
    "gradient": gradient_like(NUMEL),
    "zeros": torch.zeros(NUMEL),
    "constant": torch.full((NUMEL,), -0.3),
    "subnormal": gradient_like(NUMEL) * 1e-37,
    "halves": torch.arange(NUMEL) % 255 * 0.5,
    "huge": gradient_like(NUMEL) * 1e38,
    "nan": torch.where(torch.arange(NUMEL) == 300, torch.nan, gradient_like(NUMEL)),
    "infinite": torch.where(torch.arange(NUMEL) == NUMEL - 1, torch.inf, gradient_like(NUMEL)),
}


def random(seed: int, scale: float = 1.0, numel: int = NUMEL) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale


def room(name: str, numel: int = NUMEL) -> Tensor:
    return torch.zeros(codec_named(name).num_bytes(numel), dtype=torch.uint8)


def vectors(
    theta: Tensor, *, phi: Tensor | None = None, momentum: Tensor = EMPTY, residual: Tensor = EMPTY
) -> PieceVectors:
    phi = torch.zeros_like(theta) if phi is None else phi
    return PieceVectors(theta=theta, phi=phi, momentum=momentum, residual=residual, anchor=torch.zeros_like(theta))


def encoded(name: str, x: Tensor, *, distance: Tensor | None = None) -> Encoded:
    payload = room(name, x.numel())
    slow = Encoded(name, payload, x.numel(), 0)
    exchange.pack(vectors(x), delta=None, slow=slow, slow_is_theta=True, distance=distance)
    return slow


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", UNIFORM)
def test_payloads_have_the_bytes_that_torch_gives(name: str, sample: str) -> None:
    x, expected = SAMPLES[sample], room(name)
    codec_named(name).encode(x, expected)
    found = encoded(name, x).payload
    if x.isfinite().all():
        assert torch.equal(found, expected)
        return
    decoded = [torch.empty_like(x) for _ in range(2)]
    for payload, out in zip((found, expected), decoded, strict=True):
        codec_named(name).decode(payload, out)
    bad = torch.zeros_like(x, dtype=torch.bool)
    for begin in range(0, NUMEL, 256):  # what is in a block with NaN is anything, but not finite
        bad[begin : begin + 256] = not x[begin : begin + 256].isfinite().all()
    assert torch.equal(decoded[0][~bad], decoded[1][~bad])
    assert not decoded[0][~x.isfinite()].isfinite().any()


def test_the_lattice_has_the_bytes_that_torch_gives() -> None:
    numel = NUMEL // 256 * 256  # torch pads the motion of a short block with zeros
    x, distance = random(1, 0.02, numel), random(2, 1e-3, numel // 256).abs() + 1e-4
    expected, found = room("lattice", numel), Encoded("lattice", room("lattice", numel), numel, 0)
    lattice_encode(x, out=expected, motion=distance.repeat_interleave(256), window=WINDOW)
    kept = distance.clone()  # x hardly moves, so the window stays as it was
    exchange.pack(vectors(x, phi=x - 1e-6), delta=None, slow=found, slow_is_theta=True, distance=distance)
    assert torch.equal(distance, kept)
    assert torch.equal(found.payload, expected)


@pytest.mark.parametrize(("name", "is_unreadable"), [*((name, False) for name in NAMES), ("lattice", True)])
def test_theirs_are_read_as_torch_reads_them(name: str, is_unreadable: bool) -> None:
    near, codec = random(3, 0.02), codec_named(name)
    theirs = encoded(name, near + random(4, 1e-4), distance=torch.full((NUMEL // 256 + 1,), 2e-4))
    ours = encoded(name, near, distance=torch.full((NUMEL // 256 + 1,), 2e-4))
    if is_unreadable:
        lattice_fields(theirs.payload)[1][1:3] ^= 1
    values = [torch.empty_like(near) for _ in range(2)]
    missing = [codec.decode(each.payload, out, near=near) for each, out in zip((ours, theirs), values, strict=True)]
    difference = values[1] - values[0]
    if is_unreadable:
        difference[256:768] = 0.0
    squares, readable = torch.zeros(NUMEL // 256 + 1), torch.zeros(NUMEL // 256 + 1, dtype=torch.uint8)
    total, num_unreadable = exchange.measure(ours, theirs, numel=NUMEL, near=near, squares=squares, readable=readable)
    assert total == pytest.approx(float((difference.double() ** 2).sum()), rel=1e-5)
    assert float(squares.double().sum()) == pytest.approx(total, rel=1e-5)
    assert num_unreadable == missing[1] == int((readable == 0).sum()) == (2 if is_unreadable else 0)
    state = vectors(near.clone(), phi=near.clone())
    state.anchor.copy_(near)
    exchange.step(state, RULE, own_delta=None, own_slow=ours, deltas=[None], slows=[replace(theirs, factor=0.5)])
    assert torch.equal(state.phi, near + difference * 0.5)
    assert torch.equal(state.theta, (near - near) + state.phi)


@pytest.mark.parametrize("name", UNIFORM)
def test_a_residual_keeps_what_the_codec_loses(name: str) -> None:
    theta, phi, residual = random(5, 0.02), random(6, 0.02), random(7, 1e-3)
    state = vectors(theta.clone(), phi=phi.clone(), momentum=torch.zeros(NUMEL), residual=residual.clone())
    delta = Encoded(name, room(name), NUMEL, 0)
    squares = exchange.pack(state, delta=delta, slow=None, slow_is_theta=False, error_decay=0.5)
    assert squares == pytest.approx(float(((theta - phi).double() ** 2).sum()), rel=1e-5)
    assert torch.equal(state.anchor, theta)
    expected, sent = room(name), torch.empty(NUMEL)
    codec_named(name).encode((theta - phi) + residual * 0.5, expected)
    assert torch.equal(delta.payload, expected)
    codec_named(name).decode(expected, sent)
    rule = replace(RULE, algorithm="noloco", slow_is_theta=False, keeps_residual=True, error_decay=0.5)
    exchange.step(state, rule, own_delta=delta, own_slow=None, deltas=[], slows=[])
    assert torch.equal(state.residual, (residual * 0.5 + (theta - phi)) - sent)
    assert torch.equal(state.phi, phi + (theta - phi) * 0.7)
    assert torch.equal(state.momentum, (theta - phi) * 0.7)


def test_a_dry_step_changes_nothing() -> None:
    theta, phi, momentum = random(5), random(6), random(7)
    state = vectors(theta.clone(), phi=phi.clone(), momentum=momentum.clone())
    state.anchor.copy_(theta)
    rule = replace(RULE, algorithm="noloco", is_dry=True)
    squares = exchange.step(state, rule, own_delta=None, own_slow=None, deltas=[], slows=[])
    step = momentum * 0.5 + (theta - phi) * 0.7
    assert squares == pytest.approx(float((step.double() ** 2).sum()), rel=1e-5)
    assert torch.equal(state.theta, theta)
    assert torch.equal(state.phi, phi)
    assert torch.equal(state.momentum, momentum)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_size_tells_what_is_not_finite(bad: float) -> None:
    x = random(8)
    assert exchange.size(x) == pytest.approx(float((x.double() ** 2).sum()), rel=1e-5)
    for place in (0, 300, NUMEL - 1):
        broken = x.clone()
        broken[place] = bad
        assert not exchange.size(broken) < float("inf")


def test_nothing_is_written_beside_a_piece() -> None:
    """Pieces of a vector give the payload that the whole vector gives."""
    x = random(9, 0.02, 8 * 256 + 30)
    for name in UNIFORM:
        whole, parts = encoded(name, x), room(name, x.numel())
        for begin, end in ((0, 512), (512, 1280), (1280, x.numel())):
            state = vectors(x[begin:end].clone())
            exchange.pack(state, delta=None, slow=Encoded(name, parts, x.numel(), begin), slow_is_theta=True)
        assert torch.equal(parts, whole.payload)


def test_who_takes_this_route() -> None:
    cpu = torch.device("cpu")
    assert exchange.use_native(1, wanted=True, device=cpu)
    assert not exchange.use_native(1 << 30, wanted=False, device=cpu)
    assert not exchange.use_native(1000, wanted=None, device=cpu)
    assert exchange.use_native(COMPILE_MIN_NUMEL, wanted=None, device=cpu)
    assert not exchange.use_native(COMPILE_MIN_NUMEL, wanted=None, device=torch.device("meta"))


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }")
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    assert native.compiled_library(source) is None
    native.compiled_library.cache_clear()
    monkeypatch.undo()
    library = native.compiled_library(source)
    assert library is not None
    assert library.one() == 1
    broken = tmp_path / "broken.c"
    broken.write_text("int one(void) { return }")
    assert native.compiled_library(broken) is None
