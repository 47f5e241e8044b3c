"""Estimates of the held-out loss: exact where they can be, close where not, and without preference for any text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from model.errors import DataError
from node.heldout import PIECE_SEQUENCES, Heldout

LENGTH = 8


def tokens(num_windows: int) -> np.ndarray:
    """Every token is its position, so a window is known by its first token."""
    return np.arange(num_windows * LENGTH + 1, dtype=np.uint32)


class Texts:
    """A model's stand-in: a loss per window, and a count of how often each was looked at."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses
        self.looks = [0] * len(losses)

    def __call__(self, batch: Tensor) -> Tensor:
        assert batch.shape[1] == LENGTH + 1
        windows = [int(start) // LENGTH for start in batch[:, 0]]
        assert all(batch[row, -1] == (window + 1) * LENGTH for row, window in enumerate(windows))
        for window in windows:
            self.looks[window] += 1
        return torch.tensor([self.losses[window] for window in windows], dtype=torch.float64).mean()


@pytest.mark.parametrize("num_windows", [1, 3, 4, 5, 42, 64])
def test_the_whole_is_the_mean_over_every_window_once(num_windows: int) -> None:
    texts = Texts([float(window**2) for window in range(num_windows)])
    heldout = Heldout(tokens(num_windows), sequence_tokens=LENGTH)
    assert heldout.whole(texts) == pytest.approx(sum(texts.losses) / num_windows)
    assert texts.looks == [1] * num_windows


def test_what_all_texts_gained_alike_is_seen_exactly_by_one_piece() -> None:
    before = Texts([float(window) for window in range(42)])
    heldout = Heldout(tokens(42), sequence_tokens=LENGTH)
    whole = heldout.whole(before, remember=True)
    after = Texts([loss - 0.5 for loss in before.losses])
    for _ in range(2 * heldout.num_pieces):
        assert heldout.estimate(after, num_pieces=1) == pytest.approx(whole - 0.5)
    assert sum(after.looks) == 2 * 42


def test_the_pieces_take_turns() -> None:
    heldout = Heldout(tokens(64), sequence_tokens=LENGTH)
    texts = Texts([1.0] * 64)
    heldout.whole(texts, remember=True)
    texts.looks = [0] * 64
    for _ in range(heldout.num_pieces // 2):
        heldout.estimate(texts, num_pieces=2)
    assert texts.looks == [1] * 64


def test_all_pieces_give_the_whole_whatever_is_remembered() -> None:
    heldout = Heldout(tokens(10), sequence_tokens=LENGTH)
    heldout.whole(Texts([9.0] * 10), remember=True)
    texts = Texts([float(window) for window in range(10)])
    assert heldout.estimate(texts, num_pieces=99) == pytest.approx(4.5)


def test_a_piece_lies_far_apart() -> None:
    seen = list[Tensor]()

    def loss_of(batch: Tensor) -> Tensor:
        seen.append(batch)
        return torch.zeros(())

    Heldout(tokens(64), sequence_tokens=LENGTH).whole(loss_of)
    assert len(seen) == 64 // PIECE_SEQUENCES
    assert all((batch[1:, 0] - batch[:-1, 0]).min() >= 16 * LENGTH for batch in seen)


def test_a_diverged_measurement_is_not_remembered() -> None:
    heldout = Heldout(tokens(8), sequence_tokens=LENGTH)
    heldout.whole(Texts([float("nan")] * 8), remember=True)
    assert not heldout.is_measured
    heldout.whole(Texts([2.0] * 8), remember=True)
    heldout.whole(Texts([float("inf")] * 8), remember=True)
    assert heldout.estimate(Texts([1.0] * 8), num_pieces=1) == pytest.approx(1.0)


def test_a_set_too_short_for_one_window_is_refused() -> None:
    with pytest.raises(DataError, match="too short"):
        Heldout(tokens(1)[:-1], sequence_tokens=LENGTH).whole(Texts([1.0]))
