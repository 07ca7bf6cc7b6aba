"""What measures everything else: the peak of a run whose allocations are known, and errors that must be seen."""

import pytest
import torch

from appo_kernels.testing import assert_as_good_as, peak_extra_bytes

MI = 1 << 20


def test_peak_is_the_most_alive_at_once() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(3 * MI, dtype=torch.uint8)
        second = torch.empty(5 * MI, dtype=torch.uint8)
        del first, second
        return torch.empty(7 * MI, dtype=torch.uint8)

    assert peak_extra_bytes(run) == peak_extra_bytes(run) == 8 * MI


def test_peak_counts_what_an_operator_allocates_inside_and_nothing_from_before() -> None:
    matrix = torch.randn(512, 512)  # 1 MiB
    held = [torch.empty(64 * MI, dtype=torch.uint8)]

    def run() -> None:
        held.clear()  # not taken by the run, so giving it back makes no room
        torch.softmax(matrix.t(), -1)  # makes its argument contiguous first

    assert 2 * MI <= peak_extra_bytes(run) < 2 * MI + (64 << 10)


# Just beyond what is allowed, and the two values that comparisons let through by mistake.
@pytest.mark.parametrize("wrong", [1.01, float("nan"), float("inf")])
def test_an_error_beyond_the_framework_s_is_refused(wrong: float) -> None:
    exact = torch.ones(3, dtype=torch.float64)
    assert_as_good_as(torch.tensor([1.0, 1.0, 1.001]), exact, torch.tensor([1.0, 1.0, 1.001]))
    with pytest.raises(AssertionError, match="error"):
        assert_as_good_as(torch.tensor([1.0, 1.0, wrong]), exact, torch.tensor([1.0, 1.0, 1.001]))
