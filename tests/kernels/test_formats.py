import pytest

from kernels.formats import Q8


@pytest.mark.parametrize(
    ("numel", "num_bytes"), [(0, 0), (1, 258), (255, 258), (256, 258), (257, 516), (1 << 20, (1 << 12) * 258)]
)
def test_q8_bytes_follow_from_the_number_of_elements(numel: int, num_bytes: int) -> None:
    assert Q8.num_bytes(numel) == num_bytes


def test_q8_tolerance_is_about_half_a_code_step() -> None:
    assert 0.5 / 127 < Q8.tolerance < 0.51 / 127
