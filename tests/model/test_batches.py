"""Training and held-out batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.batches import RoundBatches, heldout_batches
from model.errors import DataError

TOKENS = np.arange(1000, dtype="<u2")


def test_an_epoch_takes_each_window_once() -> None:
    batches = RoundBatches(TOKENS, seed=1, sequence_tokens=10)
    windows = batches.next(batches.num_sequences)
    assert windows.dtype == torch.int64
    assert windows.shape == (98, 11)
    assert bool((windows.diff(dim=1) == 1).all())
    starts = sorted(windows[:, 0].tolist())
    assert np.diff(starts).tolist() == [10] * 97
    assert starts != windows[:, 0].tolist()
    assert batches.epoch == 1.0


def test_epochs_differ_in_order_and_offset() -> None:
    batches = RoundBatches(TOKENS, seed=1, sequence_tokens=10)
    epochs = [batches.next(batches.num_sequences)[:, 0].tolist() for _ in range(6)]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({min(epoch) for epoch in epochs}) > 2


def test_cursor_resumes_exactly() -> None:
    batches = RoundBatches(TOKENS, seed=5, sequence_tokens=10)
    batches.next(130)
    cursor = batches.cursor
    expected = batches.next(20)
    resumed = RoundBatches(TOKENS, seed=5, sequence_tokens=10)
    resumed.cursor = cursor
    assert torch.equal(resumed.next(20), expected)
    assert not torch.equal(RoundBatches(TOKENS, seed=6, sequence_tokens=10).next(20), expected)


@pytest.mark.parametrize("size", [11, 12, 20, 21, 22, 31])
def test_short_shards_still_give_windows(size: int) -> None:
    batches = RoundBatches(TOKENS[:size], seed=0, sequence_tokens=10)
    windows = batches.next(40)
    assert windows.shape == (40, 11)
    assert int(windows.max()) < size


def test_too_short_is_refused() -> None:
    with pytest.raises(DataError, match="too short"):
        RoundBatches(TOKENS[:10], seed=0, sequence_tokens=10)
    with pytest.raises(DataError, match="too short"):
        list(heldout_batches(TOKENS[:10], sequence_tokens=10, num_sequences=2))


def test_heldout_predicts_every_token_once() -> None:
    parts = list(heldout_batches(TOKENS, sequence_tokens=10, num_sequences=40))
    assert [part.shape[0] for part in parts] == [40, 40, 19]
    assert torch.cat(parts)[:, 1:].flatten().tolist() == list(range(1, 991))
