"""C beside Python: where it can not be compiled, there is none."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from kernels.native import compiled_library


def test_without_room_for_the_library_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        assert compiled_library.__wrapped__(source) is None


def test_what_does_not_compile_is_none(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text("this is no C")
    assert compiled_library.__wrapped__(source) is None
