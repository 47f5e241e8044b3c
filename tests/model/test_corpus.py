"""Text sources."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.corpus import DOCUMENT_CHARS, iter_files, iter_stdlib, sample_texts
from model.errors import DataError


def test_folder_is_read_in_the_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("second")
    (tmp_path / "a.txt").write_text("first, naïve", encoding="utf-8")
    assert list(iter_files(tmp_path)) == ["first, naïve", "second"]


def test_binaries_hidden_files_and_foreign_links_are_passed_over(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    folder = tmp_path / "data"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("hidden")
    (folder / ".env").write_text("hidden")
    (folder / "latin.txt").write_bytes("é".encode("latin-1") * 9)
    (folder / "image.bin").write_bytes(b"text\0more")
    (folder / "empty.txt").touch()
    (folder / "good.txt").write_text("good")
    (folder / "inner.txt").symlink_to(folder / "good.txt")
    (folder / "leak.txt").symlink_to(outside / "secret.txt")
    (folder / "leaks").symlink_to(outside)
    os.mkfifo(folder / "pipe")
    assert list(iter_files(folder)) == ["good", "good"]


def test_a_long_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100_000))
    (tmp_path / "long.txt").write_text(text)
    parts = list(iter_files(tmp_path))
    assert "".join(parts) == text
    assert len(parts) == -(-len(text) // DOCUMENT_CHARS)
    assert all(part.endswith("\n") for part in parts)


def test_a_file_without_line_ends_is_cut_too(tmp_path: Path) -> None:
    (tmp_path / "one_line.txt").write_text("x" * 3 * DOCUMENT_CHARS)
    parts = list(iter_files(tmp_path))
    assert sum(map(len, parts)) == 3 * DOCUMENT_CHARS
    assert max(map(len, parts)) <= DOCUMENT_CHARS + 64 * 1024


@pytest.mark.parametrize("content", [None, b"", b"\0\1\2"])
def test_folder_without_text_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match="holds no UTF-8 text"):
        list(iter_files(tmp_path))


def test_missing_folder_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        iter_files(tmp_path / "nowhere")


def test_stdlib_is_ample_real_and_the_same_each_time() -> None:
    texts = list(iter_stdlib())
    assert texts == list(iter_stdlib())
    assert 6e6 < sum(map(len, texts)) < 25e6
    assert any("class JSONDecoder" in text for text in texts)
    assert max(map(len, texts)) <= DOCUMENT_CHARS + 64 * 1024


def test_stdlib_holds_nothing_about_this_machine() -> None:
    assert not any("build_time_vars" in text and "/work" in text for text in iter_stdlib())


def test_cap_spreads_over_the_whole_library() -> None:
    texts = list(iter_stdlib(max_chars=1_000_000))
    assert 300_000 < sum(map(len, texts)) < 1_700_000
    everything = list(iter_stdlib())
    assert texts[0] == everything[0][: 64 * 1024]
    assert texts[-1] in [text[: 64 * 1024] for text in everything[-40:]]


def test_sample_is_strided() -> None:
    assert sample_texts(["aaaa", "bbbb", "cccc", "dddd"], 8) == ["aaaa", "cccc"]
    assert sample_texts(["a", "b"], 100) == ["a", "b"]
