"""The doctor tells what is served here, and refusals in the backends' own words."""

import pytest
import torch

from appo_kernels import cuda_library, doctor


def test_every_operator_and_backend_is_told() -> None:
    report = doctor.report()
    for op in ("frame_mass", "frame_attention", "weighted_surrogate", "group_divergence", "token_logprobs"):
        assert f"  {op}\n    cuda " in report
    assert "token_logprobs has no cuda implementation" in report
    assert "it takes float16, bfloat16, not float32" in report
    assert "its backward is built for head sizes 64, 128, not 80" in report
    assert "auto    takes torch" in report  # emulation is never taken by itself


def test_without_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPO_EMULATION_LIBRARY")
    lines = doctor.backend_lines("frame_mass", "cuda", torch.device("cpu"))
    assert lines == ["    cuda    no: its kernels run on NVIDIA GPUs and these are CPU tensors"]


def test_a_failed_launch_names_operator_and_cause() -> None:
    from appo_kernels.ops.group_divergence.cuda import DivergenceParams

    numbers = {name: 0 for name, _ in DivergenceParams._fields_}
    empty = DivergenceParams(**numbers | {"chunks": 0, "slot_count": 0})
    with pytest.raises(
        cuda_library.CudaKernelError, match=r"my_operator: appo_divergence_chunks failed: .*invalid launch"
    ):
        cuda_library.call("my_operator", "appo_divergence_chunks", empty, torch.device("cpu"))
