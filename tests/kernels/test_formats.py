import pytest

from kernels.formats import E3M0, LATTICE, Q4, Q8, TOPK, BlockFormat


@pytest.mark.parametrize(
    ("block_format", "block_size", "block_bytes"),
    [(Q8, 256, 258), (Q4, 64, 34), (E3M0, 64, 34), (TOPK, 4096, 116), (LATTICE, 256, 132)],
)
def test_bytes_follow_from_the_number_of_elements(block_format: BlockFormat, block_size: int, block_bytes: int) -> None:
    assert block_format.num_bytes(0) == 0
    assert block_format.num_bytes(1) == block_bytes
    assert block_format.num_bytes(block_size) == block_bytes
    assert block_format.num_bytes(block_size + 1) == 2 * block_bytes
    assert block_format.num_bytes(1 << 20) == (1 << 20) // block_size * block_bytes


@pytest.mark.parametrize("block_format", [Q8, Q4, E3M0, TOPK, LATTICE])
def test_blocks_fit_into_tiles(block_format: BlockFormat) -> None:
    assert 4096 % block_format.block_size == 0


def test_tolerance_of_integer_codes_is_about_half_a_step() -> None:
    assert 0.5 / 127 < Q8.tolerance < 0.51 / 127
    assert 0.5 / 7 < Q4.tolerance < 0.51 / 7
