"""A peer on a disk that is full, or that damages what it holds: training goes on, and nothing that was saved is lost."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import load_newest
from node.compute import VirtualCompute
from node.peer import Peer, PeerOptions, Summary
from protocol.blobs import BlobStore
from protocol.directory import validate_entry
from protocol.errors import TransportError, UserError, first_leaf
from protocol.memory import MemoryNetwork, MemoryTransport
from protocol.publication import SignedManifest
from protocol.virtual_time import run_virtual
from tests.node.homes import flip_bit
from tests.node.swarm import listening
from tests.protocol.samples import identity

Run = tuple[SignedManifest, BlobStore]
FULL = re.compile("No space left on device|disk is full")
Heard = list[tuple[str, dict[str, Any]]]


class Life:
    """A peer's sessions in one folder, alone on its network."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.signed, self.folder = run[0], folder
        if not folder.exists():
            folder.mkdir()
        self.store = BlobStore(folder / "blobs")
        for blob in run[1].blobs():
            self.store.put(run[1].read(blob))
        self.heard: Heard = []

    def session(self, rounds: int, *, after_event: tuple[str, Callable[[], None]] | None = None) -> Summary:
        """Train so many rounds and leave. Something may be done at the first event of a name."""
        events, self.heard = listening()
        waiting = [] if after_event is None else [after_event]

        def act(event: str, fields: dict[str, Any]) -> None:
            if waiting and waiting[0][0] == event:
                waiting.pop()[1]()

        events.listen(act)
        events.write_to(self.folder / "events.jsonl")

        async def live() -> Summary:
            own = identity(0)
            async with MemoryTransport(MemoryNetwork(), own.peer_id, validator=validate_entry) as transport:
                peer = Peer(
                    self.signed,
                    identity=own,
                    transport=transport,
                    store=self.store,
                    compute=VirtualCompute(seconds_per_call=0.3),
                    events=events,
                    folder=self.folder,
                    options=PeerOptions(sequences=2, max_rounds=rounds),
                )
                return await peer.run()

        try:
            return run_virtual(live())
        except ExceptionGroup as group:  # as node/terminal.py shows it
            raise first_leaf(group) from None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def saved_round(self) -> int:
        loaded = load_newest(self.checkpoints)
        assert loaded is not None
        assert loaded.damage == ()
        return int(loaded.meta["round"])

    def names(self) -> list[str]:
        return [name for name, _ in self.heard]

    def reasons(self, event: str) -> list[str]:
        return [str(fields["reason"]) for name, fields in self.heard if name == event]


@pytest.fixture
def life(run: Run, tmp_path: Path) -> Life:
    return Life(run, tmp_path / "life")


# ---- no room


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let every write beyond this size fail, as on a full disk. Needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_goes_on_when_nothing_can_be_saved(life: Life) -> None:
    life.session(1)
    assert life.saved_round() == 1
    with files_of_at_most(16_384):
        summary = life.session(2)
    assert summary.rounds == 2
    assert summary.val_loss_end is not None
    assert all("File too large" in reason for reason in life.reasons("checkpoint_failed"))
    assert "the previous checkpoint is untouched" in life.reasons("checkpoint_failed")[0]
    assert "snapshot_failed" in life.names()
    assert life.saved_round() == 1, "the old checkpoint is whole"
    life.session(1)
    assert "checkpoint_failed" not in life.names()
    assert life.saved_round() == 2, "one more than the last that was saved"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or mount is None or subprocess.run([mount, *options], capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave no room at all."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_fills_up_while_training(run: Run, small_disk: Path) -> None:
    life = Life(run, small_disk / "life")
    life.session(1)
    assert life.saved_round() == 1
    summary = life.session(2, after_event=("training", lambda: fill(small_disk)))
    assert summary.rounds == 2
    assert {"checkpoint_failed", "disk_error", "snapshot_failed"} <= set(life.names())
    for event in ("checkpoint_failed", "disk_error", "snapshot_failed"):
        assert all(FULL.search(reason) for reason in life.reasons(event)), life.reasons(event)
    assert life.saved_round() == 1
    (small_disk / "ballast").unlink()
    life.session(2)
    assert {"checkpoint_failed", "disk_error"}.isdisjoint(life.names())
    assert life.saved_round() == 3


def test_room_comes_back_while_training(run: Run, small_disk: Path) -> None:
    life = Life(run, small_disk / "life")
    life.session(1)
    fill(small_disk)
    life.session(3, after_event=("checkpoint_failed", (small_disk / "ballast").unlink))
    names = life.names()
    assert names.index("checkpoint_failed") < names.index("checkpoint_saved")
    assert life.saved_round() == 4


# ---- damage


def test_the_checkpoint_before_a_damaged_one_is_used_and_it_is_told(life: Life) -> None:
    life.session(2)
    newest = max(life.checkpoints.glob("*.safetensors"))
    flip_bit(newest)
    life.session(1)
    (reason,) = life.reasons("checkpoint_damaged")
    assert newest.name in reason
    (resumed,) = [fields for name, fields in life.heard if name == "resumed"]
    assert resumed["round"] >= 1
    assert life.saved_round() == resumed["round"] + 1


def test_when_all_checkpoints_are_damaged_nothing_is_overwritten(life: Life) -> None:
    life.session(2)
    for path in life.checkpoints.glob("*.safetensors"):
        flip_bit(path)
    before = {path.name: path.read_bytes() for path in life.checkpoints.iterdir()}
    with pytest.raises(UserError, match="move the folder away to start afresh") as caught:
        life.session(1)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in life.checkpoints.iterdir()} == before
    life.checkpoints.rename(life.folder / "aside")
    assert life.session(1).rounds == 1


@pytest.mark.parametrize("what", ["index", "heldout", "tokenizer"])
def test_damaged_data_with_nobody_to_mend_it(life: Life, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noticed, set aside and asked for, rather than trained on."""
    monkeypatch.setattr("node.peer.DATA_TIMEOUT_S", 1.0)
    monkeypatch.setattr("protocol.blob_exchange.PATIENCE_S", 1.0)
    manifest = life.signed.manifest
    blob = {"index": manifest.data.index, "heldout": manifest.data.heldout, "tokenizer": manifest.tokenizer.blob}[what]
    assert blob is not None
    flip_bit(life.folder / "blobs" / blob)
    with pytest.raises(TransportError):
        life.session(1)
    assert life.names()[0] == "blob_damaged"


@pytest.mark.parametrize("name", ["peers.json", "events.jsonl"])
def test_a_cache_that_cannot_be_written_is_a_warning(life: Life, name: str) -> None:
    (life.folder / name).mkdir()
    assert life.session(1).rounds == 1
    if name == "events.jsonl":
        assert life.names().count("disk_error") == 1


def test_a_status_history_that_is_garbage_does_not_stop_training(life: Life) -> None:
    (life.folder / "status.db").write_bytes(b"garbage" * 1000)
    assert life.session(1).rounds == 1
    (reason,) = life.reasons("history_unusable")
    assert "status.db is not usable" in reason
    assert (life.folder / "status.db").read_bytes() == b"garbage" * 1000
