"""The doctor tells what is served here, and refusals in the backends' own words."""

from pathlib import Path

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


def test_why_the_kernels_were_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The line that CMake leaves in the package is told; without one, that nothing was installed."""
    monkeypatch.setattr(cuda_library, "_installed", lambda name: None)
    monkeypatch.setattr(cuda_library, "native", lambda: None)
    assert "not installed with pip" in doctor.library_lines()[0]
    decision = tmp_path / cuda_library.DECISION_NAME
    decision.write_text("CUDA kernels not built: no nvcc found\n")
    monkeypatch.setattr(cuda_library, "_installed", {cuda_library.DECISION_NAME: decision}.get)
    told = doctor.library_lines()
    assert told[0] == "CUDA kernels not built: no nvcc found" and "APPO_CUDA=ON" in told[1]


def test_a_failed_launch_names_operator_and_cause() -> None:
    from appo_kernels.ops.group_divergence.cuda import DivergenceParams

    numbers = {name: 0 for name, _ in DivergenceParams._fields_}
    empty = DivergenceParams(**numbers | {"chunks": 0, "slot_count": 0})
    with pytest.raises(
        cuda_library.CudaKernelError, match=r"my_operator: appo_divergence_chunks failed: .*invalid launch"
    ):
        cuda_library.call("my_operator", "appo_divergence_chunks", empty, torch.device("cpu"))
