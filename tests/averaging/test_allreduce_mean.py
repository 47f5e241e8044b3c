"""The part owner's mean: weights, bounds, and what encoding loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from averaging.allreduce_mean import Contribution, ErrorCarry, GroupLimits, PartMean, average_part, payload_norm
from averaging.allreduce_messages import Share
from averaging.codec import DELTA_CODECS, codec_named
from tests.averaging.group_members import decoded, delta_of, encoded_update

NUMEL = 3000


def mean_of(
    deltas: list[Tensor], *, tokens: list[float] | None = None, codec: str = "fp32", limits: GroupLimits | None = None
) -> tuple[Tensor, PartMean]:
    """The owner is the first."""
    chosen = codec_named(codec)
    contributions = [
        Contribution(payload=bytes(encoded_update(delta, chosen).delta), tokens=weight, is_own=index == 0)
        for index, (delta, weight) in enumerate(zip(deltas, tokens or [1.0] * len(deltas), strict=True))
    ]
    numel = deltas[0].numel()
    part = average_part(contributions, numel=numel, codec=chosen, limits=limits or GroupLimits(), carried=None)
    return decoded(memoryview(part.payload), chosen, numel), part


def deltas(count: int) -> list[Tensor]:
    return [delta_of(index, numel=NUMEL) for index in range(count)]


def test_tokens_weigh() -> None:
    first, second, third = deltas(3)
    mean, part = mean_of([first, second, third], tokens=[1.0, 3.0, 0.0])
    assert torch.allclose(mean, 0.25 * first + 0.75 * second, atol=1e-9)
    assert part.shares == [Share.COUNTED] * 3


def test_without_tokens_all_count_alike() -> None:
    first, second = deltas(2)
    assert torch.allclose(mean_of([first, second], tokens=[0.0, 0.0])[0], (first + second) / 2, atol=1e-9)


def test_a_claim_of_tokens_is_capped() -> None:
    limits = GroupLimits(max_token_ratio=4.0)
    assert limits.capped_tokens([100, 10**15, 120]) == [100, 480, 120]
    assert limits.capped_tokens([100, 10**15]) == [100, 400]
    assert limits.capped_tokens([0, 0, 10**15]) == [0, 0, 4]


@pytest.mark.parametrize("num_members", [2, 3, 8])
@pytest.mark.parametrize("factor", [-1e9, 50.0, 1e15])
def test_one_member_moves_the_mean_by_no_more_than_the_bound(num_members: int, factor: float) -> None:
    honest = deltas(num_members - 1)
    liar = factor * delta_of(99, numel=NUMEL)
    mean, part = mean_of([*honest, liar])
    without = sum(honest, torch.zeros(NUMEL)) / num_members
    bound = GroupLimits().clip_factor * max(float(delta.norm()) for delta in honest) / num_members
    assert float((mean - without).norm()) <= bound * 1.001
    assert part.shares == [Share.COUNTED] * (num_members - 1) + [Share.CLIPPED]


def test_a_tiny_liar_does_not_shrink_the_owner() -> None:
    own = delta_of(0, numel=NUMEL)
    mean, part = mean_of([own, torch.zeros(NUMEL)])
    assert torch.allclose(mean, own / 2, atol=1e-9)
    assert part.shares == [Share.COUNTED] * 2


@pytest.mark.parametrize("codec", DELTA_CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_values_whose_norm_is_not_finite_are_left_out(codec: str, value: float) -> None:
    first, second, bad = deltas(3)
    bad[17] = value
    mean, part = mean_of([first, second, bad], codec=codec)
    assert part.shares == [Share.COUNTED, Share.COUNTED, Share.NOT_FINITE]
    assert torch.equal(mean, mean_of([first, second], codec=codec)[0])


def test_an_empty_part_has_an_empty_mean() -> None:
    nothing = torch.zeros(0)
    mean, part = mean_of([nothing, nothing], codec="q8")
    assert (mean.numel(), len(part.payload)) == (0, 0)


def test_many_tiles_give_the_same_as_one() -> None:
    numel = (1 << 17) + 4096 + 3
    first, second = delta_of(1, numel=numel), delta_of(2, numel=numel)
    mean, _ = mean_of([first, second])
    assert torch.allclose(mean, (first + second) / 2, atol=1e-9)
    codec = codec_named("fp32")
    assert payload_norm(encoded_update(first, codec).delta, numel, codec) == pytest.approx(
        float(first.norm()), rel=1e-5
    )


@pytest.mark.parametrize("name", ["q8", "q4", "e3m0"])
def test_what_encoding_loses_is_carried_over(name: str) -> None:
    """Sum of the means sent plus the carried error is the sum of the true means."""
    codec, carry = codec_named(name), ErrorCarry(0, torch.zeros(0))
    sent, true = torch.zeros(NUMEL), torch.zeros(NUMEL)
    for round in range(6):
        payloads = [bytes(encoded_update(delta_of(index, round, NUMEL), codec).delta) for index in range(3)]
        part = average_part(
            [Contribution(payload=payload, tokens=1.0, is_own=not index) for index, payload in enumerate(payloads)],
            numel=NUMEL,
            codec=codec,
            limits=GroupLimits(),
            carried=carry.within(slice(0, NUMEL)),
        )
        carry = ErrorCarry(0, part.error)
        sent += decoded(memoryview(part.payload), codec, NUMEL)
        true += sum((decoded(memoryview(payload), codec, NUMEL) for payload in payloads), torch.zeros(NUMEL)) / 3
    assert float((sent - true).norm()) > 0
    assert torch.allclose(sent + carry.values, true, atol=1e-6)


def test_the_carried_error_stays_with_its_elements() -> None:
    carry = ErrorCarry(10, torch.tensor([1.0, 2.0, 3.0]))
    assert carry.within(slice(11, 15)).tolist() == [2.0, 3.0, 0.0, 0.0]
    assert carry.within(slice(8, 11)).tolist() == [0.0, 0.0, 1.0]
    assert carry.within(slice(20, 22)).tolist() == [0.0, 0.0]
