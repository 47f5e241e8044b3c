"""Checkpoints: write order, a kill at every step, damage of every kind, a full disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import model.checkpoint
from model.checkpoint import LoadedCheckpoint, load_newest, save_checkpoint
from model.errors import CheckpointError

STEPS = ("write", "fsync", "replace", "unlink")


def tensors_of(generation: int) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((50 + i,), float(generation)) for i in range(3)}


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor per data file, so that a generation has several."""
    monkeypatch.setattr(model.checkpoint, "_FILE_BYTES", 200)


def save(folder: Path, generation: int) -> None:
    save_checkpoint(folder, tensors_of(generation), {"step": generation * 10}, generation=generation)


def loaded(folder: Path) -> LoadedCheckpoint:
    checkpoint = load_newest(folder)
    assert checkpoint is not None
    expected = tensors_of(checkpoint.generation)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in expected.items())
    assert checkpoint.meta == {"step": checkpoint.generation * 10}
    return checkpoint


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of the code under test may catch it."""


class Disk:
    """Counts what is done to the disk, and can stop or fail at one step."""

    def __init__(self, stop_at: int | None = None, failure: type[BaseException] | None = None) -> None:
        self.log: list[str] = []
        self._stop_at = stop_at
        self._failure = failure or KilledError

    def step(self, what: str, subject: str) -> None:
        if self._stop_at == len(self.log):
            raise OSError(errno.ENOSPC, "No space left on device") if self._failure is OSError else self._failure
        self.log.append(f"{what} {subject}")


@contextmanager
def watched(disk: Disk) -> Iterator[None]:
    """Route the system calls that change the disk through `disk`; a killed write leaves half of its bytes."""
    real_write, real_fsync, real_replace, real_unlink = os.write, os.fsync, os.replace, Path.unlink

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    def write(descriptor: int, data: memoryview) -> int:
        try:
            disk.step("write", name_of(descriptor))
        except BaseException:
            real_write(descriptor, data[: len(data) // 2])
            raise
        return real_write(descriptor, data)

    def fsync(descriptor: int) -> None:
        disk.step("fsync", name_of(descriptor))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        disk.step("replace", target.name)
        real_replace(source, target)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if not missing_ok:  # the tidying after an error is not a step of the protocol
            disk.step("unlink", self.name)
        real_unlink(self, missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "unlink", unlink)
        yield


def num_steps(tmp_path: Path) -> int:
    folder = tmp_path / "measured"
    for generation in (1, 2):
        save(folder, generation)
    disk = Disk()
    with watched(disk):
        save(folder, 3)
    return len(disk.log)


def test_round_trip_and_numbering(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoints"
    assert load_newest(folder) is None
    for generation in range(5):
        save(folder, generation)
        checkpoint = loaded(folder)
        assert checkpoint.generation == generation
        assert checkpoint.damage == ()
    names = sorted(path.name for path in folder.iterdir())
    assert {name[:8] for name in names} == {"00000003", "00000004"}
    assert len(names) == 2 * 4


def test_write_order(tmp_path: Path) -> None:
    for generation in (1, 2):
        save(tmp_path, generation)
    disk = Disk()
    with watched(disk):
        save(tmp_path, 3)
    expected = []
    for name in [*(f"00000003-000{i}.safetensors" for i in range(3)), "00000003.json"]:
        expected += [f"write {name}.tmp"] * (1 if name.endswith("json") else 2)
        expected += [f"fsync {name}.tmp", f"replace {name}", f"fsync {tmp_path.name}"]
    assert disk.log[: len(expected)] == expected
    rest = disk.log[len(expected) :]
    assert rest[0] == "unlink 00000001.json"
    assert all(line.startswith("unlink 00000001-") for line in rest[1:-1])
    assert rest[-1] == f"fsync {tmp_path.name}"


def test_a_kill_at_every_step_leaves_a_whole_generation(tmp_path: Path) -> None:
    total = num_steps(tmp_path)
    assert total > 20
    for step in range(total):
        folder = tmp_path / str(step)
        for generation in (1, 2):
            save(folder, generation)
        with watched(Disk(step)), pytest.raises(KilledError):
            save(folder, 3)
        checkpoint = loaded(folder)
        assert checkpoint.generation in (2, 3)
        finished = (folder / "00000003.json").exists()
        assert checkpoint.generation == (3 if finished else 2)
        leftovers = any(path.name.startswith("00000003") for path in folder.iterdir())
        assert bool(checkpoint.damage) == (leftovers and not finished)  # an unfinished save is told, too
        save(folder, checkpoint.generation + 1)  # and the next save tidies up
        assert loaded(folder).damage == ()
        assert not list(folder.glob("*.tmp"))
        assert len({path.name[:8] for path in folder.iterdir()}) == 2


def test_a_kill_in_the_very_first_save_is_like_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with watched(Disk(6)), pytest.raises(KilledError):
        save(tmp_path, 0)
    assert load_newest(tmp_path) is None
    assert "passed over" in caplog.text


def test_a_full_disk_at_every_step_keeps_the_previous_generation(tmp_path: Path) -> None:
    for step in range(num_steps(tmp_path)):
        folder = tmp_path / str(step)
        for generation in (1, 2):
            save(folder, generation)
        with watched(Disk(step, OSError)), pytest.raises(CheckpointError, match=r"No space left.*untouched") as caught:
            save(folder, 3)
        assert "\n" not in str(caught.value)
        assert loaded(folder).generation in (2, 3)
        assert not list(folder.glob("*.tmp"))
        is_whole = (folder / "00000003.json").exists()
        assert is_whole or not list(folder.glob("00000003*")), "it would take the room of the next save, for ever"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def damage_all(path: Path) -> Iterator[None]:
    """Every kind of damage to one file, undone in between."""
    whole = path.read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        flip(path, position)
        yield
        path.write_bytes(whole)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        yield
        path.write_bytes(whole)
    path.write_bytes(whole + b"\0")
    yield
    path.unlink()
    yield
    path.write_bytes(whole)


def test_damage_is_passed_over_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for generation in (7, 8):
        save(tmp_path, generation)
    for path in sorted(tmp_path.glob("00000008*")):
        for _ in damage_all(path):
            caplog.clear()
            checkpoint = loaded(tmp_path)
            assert checkpoint.generation == 7
            assert len(checkpoint.damage) == 1
            assert checkpoint.damage[0].startswith("checkpoint 8: ")
            assert "passed over" in caplog.text
    assert loaded(tmp_path).generation == 8


def test_saving_goes_on_after_damage(tmp_path: Path) -> None:
    for generation in (7, 8):
        save(tmp_path, generation)
    flip(tmp_path / "00000008-0001.safetensors", 100)
    assert loaded(tmp_path).generation == 7
    save(tmp_path, 8)
    checkpoint = loaded(tmp_path)
    assert (checkpoint.generation, checkpoint.damage) == (8, ())
    flip(tmp_path / "00000008.json", 100)
    assert loaded(tmp_path).generation == 7  # the good older one was kept


def test_generations_beyond_the_saved_one_are_void(tmp_path: Path) -> None:
    for generation in (5, 6):
        save(tmp_path, generation)
    for suffix in (".json", "-0000.safetensors"):
        (tmp_path / f"00000009{suffix}").write_bytes(b"remains")
    assert loaded(tmp_path).generation == 6
    save(tmp_path, 7)
    assert loaded(tmp_path).damage == ()
    assert {path.name[:8] for path in tmp_path.iterdir()} == {"00000006", "00000007"}


def test_all_generations_damaged(tmp_path: Path) -> None:
    for generation in (7, 8):
        save(tmp_path, generation)
        flip(tmp_path / f"{generation:08d}.json", 80)
    with pytest.raises(CheckpointError, match="start afresh") as caught:
        load_newest(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    tmp_path.joinpath("notes.txt").write_text("mine")
    for generation in range(3):
        save(tmp_path, generation)
    assert tmp_path.joinpath("notes.txt").read_text() == "mine"


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(CheckpointError):
        save(path, 0)
    with pytest.raises(CheckpointError):
        load_newest(path)


@pytest.mark.parametrize("meta", [{"loss": float("nan")}, {"tensor": torch.ones(1)}])
def test_meta_that_is_not_json_is_a_bug_of_the_caller(tmp_path: Path, meta: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        save_checkpoint(tmp_path, tensors_of(1), meta, generation=1)
