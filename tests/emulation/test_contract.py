"""Backend "cuda" takes exactly what the documentation says, and the operators' tests are run with it."""

import itertools
import types

import pytest
import torch
from backend_contract import may_refuse
from backends import served

from appo_kernels import cuda_library, dispatch, doctor

CPU = torch.device("cpu")


# Every operator there is, so that a new one cannot be left out.
@pytest.mark.parametrize("op", doctor.operators())
def test_cuda_refuses_what_it_may_and_nothing_else(op: str) -> None:
    head_dims = (8, *doctor.HEAD_DIMS, 257) if op in doctor.WITH_HEADS else (0,)
    for dtype, head_dim, needs_grad in itertools.product(doctor.DTYPES, head_dims, (False, True)):
        problem = dispatch.Problem(op, CPU, dtype, head_dim, needs_grad)
        reason = dispatch.why_not(problem, "cuda")
        assert (reason is not None) == may_refuse(problem, "cuda"), f"{problem}: {reason or 'served'}"


# The two operators of which one form has CUDA kernels and another has none.
@pytest.mark.parametrize("op", ["weighted_surrogate", "group_divergence"])
def test_what_has_no_cuda_kernel_is_tritons_on_a_gpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert cuda_library.next_best(op, on_gpu) is dispatch.implementation(op, "triton")
    on_gpu.dtype = torch.float64
    assert cuda_library.next_best(op, on_gpu) is dispatch.implementation(op, "torch")
    assert cuda_library.next_best(op, torch.zeros(1)) is dispatch.implementation(op, "torch")


# One operator for each list of backends that the tests of rows share.
@pytest.mark.parametrize("op", ["group_divergence", "weighted_surrogate"])
def test_the_tests_of_rows_run_with_cuda(op: str) -> None:
    """The attention operators' are in test_operator_matrix.py: theirs take fp32 and a head size that is not built."""
    assert ("cuda", "cpu") in served(op)
