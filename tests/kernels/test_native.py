"""C beside Python: where it can not be compiled, there is none."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from kernels.native import compiled_library
from kernels.sparse import SOURCE


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


@pytest.mark.skipif(compiled_library(SOURCE) is None, reason="no C compiler here")
def test_several_files_and_a_header_beside_them_are_one_library(tmp_path: Path) -> None:
    (tmp_path / "numbers.h").write_text("static int one(void) { return 1; }")
    sources = [tmp_path / f"{name}.c" for name in ("next", "after")]
    for source, more in zip(sources, (1, 2), strict=True):
        source.write_text(f'#include "numbers.h"\nint {source.stem}(void) {{ return one() + {more}; }}')
    library = compiled_library(*sources)
    assert library is not None
    assert (library.next(), library.after()) == (2, 3)
