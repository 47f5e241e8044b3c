"""Where text comes from: a folder, or the standard library of the Python that is running.

A document is at most `DOCUMENT_CHARS` characters: a longer file is cut at line ends, so that one huge file still has parts to
hold out and memory stays small. Order is by path, so the same files give the same documents everywhere.
"""

from __future__ import annotations

import logging
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.errors import DataError

__all__ = ["DOCUMENT_CHARS", "iter_files", "iter_stdlib", "sample_texts"]

DOCUMENT_CHARS = 256 * 1024
_SAMPLE_PIECE_CHARS = 64 * 1024
_LOG = logging.getLogger(__name__)
# Not text in the sense of a corpus: other people's packages, tests, and modules that are one generated table.
_STDLIB_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings"})
_STDLIB_SKIPPED_FILES = ("_sysconfigdata", "topics.py")


def iter_files(folder: Path) -> Iterator[str]:
    """Documents of all UTF-8 text files below a folder.

    Hidden files and folders, empty files, binaries and links that leave the folder are passed over; a file that turns out not
    to be UTF-8 half-way ends there.

    Args:
        folder: where to look, recursively.

    Yields:
        Texts of at most `DOCUMENT_CHARS` characters and one more line.

    Raises:
        DataError: at once when there is no such folder; at the end when it held no text.
    """
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist or is not a folder; give a folder with text files")
    return _documents(folder)


def _documents(folder: Path) -> Iterator[str]:
    num_documents = 0
    for path in _text_candidates(folder, frozenset()):
        for document in _cut(path):
            num_documents += 1
            yield document
    if not num_documents:
        raise DataError(f"data folder {folder} holds no UTF-8 text; put text files there or name another folder")


def iter_stdlib(*, max_chars: int | None = None) -> Iterator[str]:
    """The embedded corpus: sources of the running Python's standard library, and the language reference that `help()` shows.

    Args:
        max_chars: take evenly spread documents of about this much text in all; None for everything, about 13 million.

    Yields:
        Texts of at most `DOCUMENT_CHARS` characters and one more line.

    Raises:
        DataError: this Python has no readable standard library.
    """
    documents = _stdlib_documents()
    return documents if max_chars is None else iter(sample_texts(list(documents), max_chars))


def _stdlib_documents() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    num_documents = 0
    for path in _text_candidates(root, _STDLIB_SKIPPED_FOLDERS):
        if path.suffix != ".py" or path.name.startswith(_STDLIB_SKIPPED_FILES):
            continue
        for document in _cut(path):
            num_documents += 1
            yield document
    yield from _topics()
    if not num_documents:
        raise DataError(f"no Python sources below {root}; use data kind files with a folder of your own")


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics  # 0.8 MB of prose; some distributions leave it out
    except ImportError:
        return
    for name in sorted(topics):
        yield topics[name]


def sample_texts(texts: Sequence[str], max_chars: int) -> list[str]:
    """Evenly spread documents, each cut to 64 Ki characters, of about `max_chars` characters in all.

    The choice depends on the texts alone, so every run of it gives the same sample.
    """
    total = sum(min(len(text), _SAMPLE_PIECE_CHARS) for text in texts)
    stride = max(1, -(-total // max_chars))
    return [text[:_SAMPLE_PIECE_CHARS] for text in texts[::stride]]


def _text_candidates(folder: Path, skipped: frozenset[str]) -> Iterator[Path]:
    root = folder.resolve()
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            inside = not path.is_symlink() or path.resolve().is_relative_to(root)
            if inside and path.is_file() and not name.startswith("."):
                yield path


def _cut(path: Path) -> Iterator[str]:
    """The file in documents, as far as it is text."""
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(DOCUMENT_CHARS):
                if "\0" in piece:
                    return
                yield piece + file.readline(_SAMPLE_PIECE_CHARS)
    except UnicodeDecodeError:
        return
    except OSError as error:
        _LOG.warning("skipped unreadable file", extra={"path": str(path), "reason": error.strerror})
