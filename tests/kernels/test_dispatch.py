import pytest
import torch

from kernels import dispatch


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Records every probe of the compiler, and lets it succeed at once."""
    calls: list[None] = []

    def probe() -> bool:
        calls.append(None)
        return True

    monkeypatch.setattr(dispatch, "compiler_works", probe)
    return calls


def test_small_tensors_never_touch_the_compiler(probes: list[None]) -> None:
    assert not dispatch.use_compiled(15_999_999, wanted=None)
    assert not dispatch.use_compiled(10**9, wanted=False)
    assert probes == []


def test_large_tensors_or_a_wish_compile(probes: list[None]) -> None:
    assert dispatch.use_compiled(16_000_000, wanted=None)
    assert dispatch.use_compiled(10, wanted=True)
    assert len(probes) == 2


def test_a_machine_without_compiler_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    dispatch.compiler_works.cache_clear()
    try:
        assert not dispatch.use_compiled(10**9, wanted=True)
    finally:
        dispatch.compiler_works.cache_clear()


def test_tiles_are_whole_blocks() -> None:
    for device in ("cpu", "cuda"):
        assert dispatch.tile_numel(torch.device(device)) % 256 == 0
