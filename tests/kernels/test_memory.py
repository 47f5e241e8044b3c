"""Huge pages are a wish: tensors are what they were, with or without them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from kernels import memory
from kernels.memory import in_huge_pages

LARGE = 1 << 23
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("numel", [0, 1, 1000, LARGE, LARGE + 1])
def test_a_tensor_keeps_its_place_and_values(numel: int) -> None:
    x = torch.zeros(numel)
    place = x.data_ptr()
    assert in_huge_pages(x) is x
    assert x.data_ptr() == place
    assert not x.any()
    x.fill_(2.0)
    in_huge_pages(x[1:])  # begins within a page
    assert x.eq(2.0).all()


def test_nothing_happens_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    memory._madvise.cache_clear()
    try:
        assert in_huge_pages(torch.zeros(LARGE)).numel() == LARGE
    finally:
        memory._madvise.cache_clear()


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this machine gives no huge pages")
def test_large_vectors_lie_in_huge_pages() -> None:
    x = in_huge_pages(torch.empty(4 * LARGE)).fill_(1.0)
    middle, maps = x[2 * LARGE :].data_ptr(), Path("/proc/self/smaps").read_text().splitlines()
    for number, line in enumerate(maps):
        first, _, last = line.split(" ")[0].partition("-")
        if last and int(first, 16) <= middle < int(last, 16):
            huge = next(each for each in maps[number:] if each.startswith("AnonHugePages"))
            assert int(huge.split()[1]) * 1024 > x.numel() * 4 // 2
            return
    pytest.fail("the tensor is in no map")
