"""Background saving."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_newest
from model.checkpoint_writer import CheckpointWriter


class Gate:
    """Holds every flush to disk until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        real = os.fsync

        def fsync(descriptor: int) -> None:
            self.reached.set()
            assert self.opened.wait(20)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


def test_submitted_tensors_may_change_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    tensor = torch.zeros(1000)
    with CheckpointWriter(tmp_path) as writer:
        assert writer.submit({"t": tensor}, {"n": 1}, generation=1)
        assert gate.reached.wait(20)
        tensor.fill_(9)
        assert writer.busy
        assert not writer.submit({"t": tensor}, {"n": 2}, generation=2)  # refused, nothing queued
        assert not writer.flush(timeout_s=0)
        gate.opened.set()
        assert writer.flush()
        results = writer.take_results()
        assert [(r.generation, r.error) for r in results] == [(1, None)]
        assert results[0].num_bytes > 4000
        assert writer.take_results() == []
        assert writer.submit({"t": tensor}, {"n": 2}, generation=2)
    checkpoint = load_newest(tmp_path)  # leaving the block has finished the write
    assert checkpoint is not None
    assert checkpoint.generation == 2
    assert torch.equal(checkpoint.tensors["t"], torch.full((1000,), 9.0))


def test_buffers_follow_new_shapes(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer:
        for generation, size in enumerate((10, 10, 20, 5)):
            assert writer.submit({"t": torch.full((size,), float(size))}, {}, generation=generation)
            assert writer.flush()
            checkpoint = load_newest(tmp_path)
            assert checkpoint is not None
            assert checkpoint.tensors["t"].tolist() == [float(size)] * size


def test_a_full_disk_is_a_result_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointWriter(tmp_path) as writer:
        assert writer.submit({"t": torch.ones(3)}, {}, generation=1)
        assert writer.flush()
        with monkeypatch.context() as patch:

            def full(descriptor: int, data: memoryview) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "write", full)
            assert writer.submit({"t": torch.zeros(3)}, {}, generation=2)
            assert writer.flush()
        assert writer.submit({"t": torch.zeros(3)}, {}, generation=2)
        assert writer.flush()
        errors = [result.error for result in writer.take_results()]
    assert errors[0] is None
    assert "No space left" in str(errors[1])
    assert errors[2] is None


def test_a_bug_in_the_thread_reaches_the_owner(tmp_path: Path) -> None:
    with pytest.raises(TypeError), CheckpointWriter(tmp_path) as writer:
        writer.submit({"t": torch.ones(3)}, {"not": object()}, generation=1)


def test_a_bug_in_the_thread_ends_a_flush(tmp_path: Path) -> None:
    def submit_and_flush() -> None:
        with CheckpointWriter(tmp_path) as writer:
            assert writer.submit({"t": torch.ones(3)}, {"not": object()}, generation=1)
            writer.flush(timeout_s=20)
            raise AssertionError("flush must raise")

    with pytest.raises(TypeError):
        submit_and_flush()
