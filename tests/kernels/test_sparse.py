"""Top-k with two levels, against brute force in numpy."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import sparse
from kernels.formats import TOPK
from kernels.sparse import NUM_KEPT, topk_decode, topk_decode_add, topk_encode
from tests.kernels.samples import TILE, gradient_like

SIZES = [1, 64, 100, 4095, 4096, 4097, 3 * 4096 + 5, TILE, TILE + 4096 + 9]


@pytest.fixture(autouse=True, params=[False, True], ids=["torch", "C"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for both."""
    for name in ("topk_encode", "topk_decode", "topk_decode_add"):
        function = partial(getattr(sparse, name), native=request.param)
        monkeypatch.setattr(sys.modules[__name__], name, function)


def encoded(x: Tensor) -> Tensor:
    payload = torch.full((TOPK.num_bytes(x.numel()),), 0xA5, dtype=torch.uint8)
    topk_encode(x, out=payload)
    return payload


def decoded(payload: Tensor, numel: int) -> Tensor:
    out = torch.full((numel,), torch.nan)
    topk_decode(payload, out)
    return out


def least_error(magnitudes: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Squared error of the best two levels for descending magnitudes, by trying every cut."""
    cuts = (np.split(magnitudes, [cut]) for cut in range(1, len(magnitudes)))
    return float(min(sum(float(((part - part.mean()) ** 2).sum()) for part in cut) for cut in cuts))


@pytest.mark.parametrize("numel", SIZES)
def test_the_largest_values_are_sent_with_their_signs(numel: int) -> None:
    x = gradient_like(numel)
    values = decoded(encoded(x), numel)
    for first in range(0, numel, 4096):
        chunk, sent = x[first : first + 4096], values[first : first + 4096]
        assert (sent != 0).sum() <= NUM_KEPT
        assert torch.equal(sent.sign(), sent.sign() * (chunk * sent > 0))
        unsent = chunk.abs()[sent == 0]
        if (sent != 0).sum() == NUM_KEPT and unsent.numel():
            assert unsent.max() <= chunk.abs()[sent != 0].min()
        assert len(set(sent.abs()[sent != 0].tolist())) <= 2


@pytest.mark.parametrize("numel", SIZES)
def test_both_routes_give_the_same_bytes_and_values(numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(2)) * 1e-3 + 1e-9  # no two of the same size
    payloads = [torch.full((TOPK.num_bytes(numel),), 0xA5, dtype=torch.uint8) for _ in range(2)]
    added = [torch.ones(numel) for _ in range(2)]
    for native in (False, True):
        sparse.topk_encode(x, out=payloads[native], native=native)
        sparse.topk_decode_add(payloads[0], added[native], weight=0.3, native=native)
    if numel % 4096 in (0, *range(64, 4096)):  # else the rest of the 64 are zeros of the padding, in any order
        assert torch.equal(*payloads)
    assert torch.equal(*added)


def test_the_two_levels_are_the_best_ones() -> None:
    x = gradient_like(20 * 4096)
    values = decoded(encoded(x), x.numel())
    for chunk, sent in zip(x.view(-1, 4096), values.view(-1, 4096), strict=True):
        kept = np.sort(np.abs(chunk.double().numpy()))[::-1][:NUM_KEPT]
        places = sent != 0
        error = float((chunk[places].double() - sent[places].double()).square().sum())
        assert error <= least_error(kept) + 2**-16 * float((kept**2).sum())  # levels are rounded to bfloat16


def test_layout() -> None:
    """Two levels, 2-bit codes, two indices in three bytes, all in the order of magnitude."""
    x = torch.zeros(4096)
    x[0xABC], x[0x123], x[5] = 4.0, -4.0, -1.0
    payload = encoded(x)
    assert payload[:4].view(torch.bfloat16).tolist()[0] == 4.0
    assert payload[4] & 0b1111 in (0b0001, 0b0100)  # both large, one of them negative
    first, second = payload[20:23].tolist(), sorted(((0xABC, 0x123), (0x123, 0xABC)))
    assert (first[0] | (first[1] & 15) << 8, first[1] >> 4 | first[2] << 4) in second


def test_one_value_alone_is_exact_to_bfloat16() -> None:
    x = torch.zeros(5000)
    x[4500] = -1.5
    values = decoded(encoded(x), 5000)
    assert torch.equal(values, x)


@pytest.mark.parametrize("value", [0.0, 1e-40, 2.5, 3e38])
def test_constant_vectors(value: float) -> None:
    values = decoded(encoded(torch.full((4200,), value)), 4200)
    sent = values[values != 0]
    assert sent.numel() == (0 if value == 0 else 128)
    assert torch.allclose(sent, torch.full_like(sent, value), rtol=2**-8)


def test_what_is_not_sent_stays_in_the_residual_to_the_bit() -> None:
    x = gradient_like(9000)
    sent = decoded(encoded(x), 9000)
    residual = x - sent
    assert torch.equal(residual[sent == 0], x[sent == 0])
    torch.testing.assert_close(residual.double() + sent.double(), x.double(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_non_finite_and_in_their_chunk(bad: float) -> None:
    x = gradient_like(3 * 4096)
    x[5000] = bad
    values = decoded(encoded(x), x.numel()).view(3, 4096)
    assert values.isfinite().all(dim=1).tolist() == [True, False, True]


def test_slices_equal_the_whole() -> None:
    numel = 3 * 4096 + 100
    x, pieces, out = gradient_like(numel), torch.zeros(TOPK.num_bytes(numel), dtype=torch.uint8), torch.empty(numel)
    for start, stop in [(8192, numel), (0, 8192)]:
        topk_encode(x[start:stop], out=pieces, start=start)
    assert torch.equal(pieces, encoded(x))
    for start, stop in [(4096, numel), (0, 4096)]:
        topk_decode(pieces, out[start:stop], start=start)
    assert torch.equal(out, decoded(pieces, numel))


def test_decode_add_weighs_and_leaves_the_rest_alone() -> None:
    x, base = gradient_like(9000), gradient_like(9000, seed=1)
    payload, out = encoded(x), base.clone()
    topk_decode_add(payload, out, weight=0.25)
    value = decoded(payload, 9000)
    assert torch.equal(out[value == 0], base[value == 0])
    torch.testing.assert_close(out, base + 0.25 * value)


def test_an_index_that_occurs_twice_counts_twice_in_both_decoders() -> None:
    """What admission measures with `decode` is then what `decode_add` puts into the step."""
    payload = torch.zeros(TOPK.num_bytes(4096), dtype=torch.uint8)
    payload[:4] = torch.tensor([1.0, 0.5]).bfloat16().view(torch.uint8)
    value, added = decoded(payload, 4096), torch.zeros(4096)
    topk_decode_add(payload, added, weight=1.0)
    assert value[0] == 64.0
    assert torch.equal(added, value)


def test_given_scratch_changes_nothing_and_input_survives() -> None:
    x = gradient_like(TILE + 5000)
    before, payload = x.clone(), torch.empty(TOPK.num_bytes(TILE + 5000), dtype=torch.uint8)
    topk_encode(x, out=payload, scratch=torch.full((TILE,), torch.nan))
    assert torch.equal(payload, encoded(x))
    assert torch.equal(x, before)


def test_error_feedback_delivers_everything_in_time() -> None:
    """With a constant input, what has been sent grows as fast as the input although 1/64 of the values travel at a time."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    residual, sent = torch.zeros(4096), torch.zeros(4096)
    for _ in range(600):
        residual += x
        value = decoded(encoded(residual), 4096)
        residual -= value
        sent += value
    torch.testing.assert_close(sent + residual, 600 * x, rtol=1e-3, atol=1e-2)
    assert (sent / 600 - x).norm() < 0.2 * x.norm()
