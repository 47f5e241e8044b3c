"""One stage's arithmetic and bookkeeping, and what travels between stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.initial import initialise
from model.stage import Stage, run_path
from node.pipeline.activations import ACTIVATION_CODECS, ActivationCodec
from node.pipeline.worker import StageWorker, VisitGoneError
from protocol.errors import ProtocolError
from tests.node.pipeline.stages import CONFIG, SEQUENCES, TOKENS, microbatches

KEY = ("origin", 0)
SHAPE = (SEQUENCES, TOKENS, CONFIG.hidden_size)


def workers(num_stages: int) -> list[StageWorker]:
    made = []
    for number in range(num_stages):
        stage = Stage(CONFIG, number, num_stages)
        initialise(stage, seed=1)
        made.append(StageWorker(stage))
    return made


def visit_all(pipeline: list[StageWorker], tokens: Tensor, key: tuple[str, int] = KEY) -> float:
    """Forward, loss and backward through all stages, everything counted."""
    hidden = tokens
    for worker in pipeline:
        hidden = worker.forward(key, hidden)
    loss, gradient = pipeline[0].loss(key, hidden)
    for worker in reversed(pipeline):
        onward = worker.backward(key, gradient)
        worker.commit(key)
        gradient = gradient if onward is None else onward
    return loss


def test_gradients_are_means_over_the_tokens_that_came_by() -> None:
    pipeline, batches = workers(3), microbatches(2)
    losses = [visit_all(pipeline, batch, ("origin", number)) for number, batch in enumerate(batches)]
    plain = workers(3)
    expected = torch.stack([run_path([worker.stage for worker in plain], batch) for batch in batches])
    assert losses == pytest.approx(expected.tolist(), abs=1e-6)
    for worker in plain:
        worker.clear()
    expected.mean().backward()  # type: ignore[no-untyped-call]
    for worker, other in zip(pipeline, plain, strict=True):
        assert worker.end_iteration(least_tokens=1) == 2 * SEQUENCES * TOKENS
        for mine, its in zip(worker.stage.parameters(), other.stage.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, atol=1e-6, rtol=1e-4)


def test_what_is_not_committed_does_not_count() -> None:
    (worker, second) = workers(2)
    hidden = worker.forward(KEY, microbatches(1)[0])
    _, gradient = worker.loss(KEY, second.forward(KEY, hidden))
    second.backward(KEY, gradient)
    second.forget(KEY)
    second.forget(KEY)
    with pytest.raises(VisitGoneError):
        second.commit(KEY)
    assert second.num_tokens == 0
    assert all(bool((p.grad == 0).all()) for p in second.stage.parameters() if p.grad is not None)
    assert second.end_iteration(least_tokens=1) == 0


def test_too_few_tokens_are_no_step() -> None:
    pipeline = workers(2)
    visit_all(pipeline, microbatches(1)[0])
    assert pipeline[1].end_iteration(least_tokens=SEQUENCES * TOKENS + 1) == 0
    assert all(bool((p.grad == 0).all()) for p in pipeline[1].stage.parameters() if p.grad is not None)
    assert pipeline[0].end_iteration(least_tokens=SEQUENCES * TOKENS) == SEQUENCES * TOKENS


def test_a_visit_taken_over_gives_the_same_gradient() -> None:
    first, second = workers(2)
    _, replica = workers(2)
    hidden = first.forward(KEY, microbatches(1)[0])
    _, gradient = first.loss(KEY, second.forward(KEY, hidden))
    replica.admit(KEY, hidden)
    mine, its = second.backward(KEY, gradient), replica.backward(KEY, gradient)
    assert mine is not None
    assert its is not None
    assert torch.equal(mine, its)


@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8), ("q8", 0.02)])
def test_activations_survive_within_their_tolerance(name: str, tolerance: float) -> None:
    codec = ActivationCodec(name, SHAPE)
    hidden = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    data = codec.encode(hidden)
    assert data.nbytes == codec.num_bytes
    found = codec.decode(data)
    assert float((found - hidden).norm() / hidden.norm()) <= tolerance


@pytest.mark.parametrize("name", ACTIVATION_CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_poison_is_refused(name: str, value: float) -> None:
    codec = ActivationCodec(name, SHAPE)
    hidden = torch.zeros(SHAPE)
    hidden[0, 0, 0] = value
    with pytest.raises(ProtocolError, match="not finite or far too large"):
        codec.decode(codec.encode(hidden))


def test_nothing_is_committed_once_the_iteration_has_ended() -> None:
    """A commit may come from another thread, late."""
    (worker, second) = workers(2)
    _, gradient = worker.loss(KEY, second.forward(KEY, worker.forward(KEY, microbatches(1)[0])))
    second.backward(KEY, gradient)
    assert second.end_iteration(least_tokens=1) == 0
    with pytest.raises(VisitGoneError):
        second.commit(KEY)
    assert second.num_tokens == 0
