"""The folder tree of a node, and the manifests kept in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from node.home import Home, keep_manifest, kept_manifest
from protocol.blobs import BlobStore
from protocol.errors import UserError
from protocol.ids import RunId
from protocol.publication import SignedManifest

Run = tuple[SignedManifest, BlobStore]


def test_the_home_is_private_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_NODE_HOME", str(tmp_path / "deep" / "home"))
    home = Home.at(None)
    assert home.root == tmp_path / "deep" / "home"
    assert home.root.stat().st_mode & 0o777 == 0o700
    assert Home.at(home.root) == home
    assert Home.at(home.root).runtime == home.runtime
    assert home.runs() == []


def test_other_homes_have_other_runtime_folders(tmp_path: Path) -> None:
    first, second = Home.at(tmp_path / "a"), Home.at(tmp_path / "b")
    assert first.runtime != second.runtime
    assert len(os.fsencode(first.runtime)) < 80, "a socket's path has at most 107 bytes"


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--home"):
        Home.at(tmp_path / "file")
    with pytest.raises(UserError, match="--home"):
        Home.at(tmp_path / "file" / "below")


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    home = Home.at(tmp_path)
    (tmp_path / "runs" / "ab").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        home.run(RunId("ab"))


def test_the_latest_run_comes_last(tmp_path: Path, run: Run) -> None:
    home = Home.at(tmp_path)
    folders = [home.run(RunId(name * 32)) for name in ("aa", "bb", "cc")]
    for age, folder in zip((3, 1, 2), folders, strict=True):
        keep_manifest(folder, run[0])
        os.utime(folder / "manifest.bin", (1.7e9 - age, 1.7e9 - age))
    assert [folder.name[:2] for folder in home.runs()] == ["aa", "cc", "bb"]
    keep_manifest(folders[0], run[0])  # joined again: now it is the latest
    assert [folder.name[:2] for folder in home.runs()] == ["cc", "bb", "aa"]


def test_a_kept_manifest_is_the_same(tmp_path: Path, run: Run) -> None:
    keep_manifest(tmp_path, run[0])
    assert kept_manifest(tmp_path) == run[0]


def test_a_full_disk_never_costs_the_manifest(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_manifest(tmp_path, run[0])

    def refuse(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    keep_manifest(tmp_path, run[0])  # nothing to write
    (tmp_path / "manifest.bin").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(UserError, match="No space left on device; free some space"):
        keep_manifest(tmp_path, run[0])
    (tmp_path / "elsewhere.bin").rename(tmp_path / "manifest.bin")
    assert kept_manifest(tmp_path) == run[0]


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: b"", lambda d: bytes([d[0] ^ 1]) + d[1:], lambda d: b"\0" * 99]
)
def test_a_damaged_manifest(tmp_path: Path, run: Run, damage: object) -> None:
    assert callable(damage)
    (tmp_path / "manifest.bin").write_bytes(damage(run[0].pack()))
    with pytest.raises(UserError, match=r"is damaged .*--peer") as caught:
        kept_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.bin").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*--peer"):
        kept_manifest(tmp_path)
