"""Which backend "auto" takes, on machines that are not here: every backend says yes, and the device is made up."""

import pytest
import torch

from appo_kernels import dispatch

ATTENTION, VOCABULARY = ("frame_attention", 128), ("group_divergence", 0)


def chosen(monkeypatch: pytest.MonkeyPatch, op: str, head_dim: int, device: str, major: int = 0) -> str:
    monkeypatch.delenv("APPO_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "why_not", lambda problem, backend: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    dispatch._automatic.cache_clear()
    try:
        return dispatch.resolve(op, "auto", torch.device(device), torch.bfloat16, head_dim)
    finally:
        dispatch._automatic.cache_clear()


# mma.sync is what the hardware of 8.x and 12.x has; 9.x and 10.x have more, which only Triton uses here.
@pytest.mark.parametrize("major, backend", [(8, "cuda"), (9, "triton"), (10, "triton"), (12, "cuda")])
def test_attention_on_a_gpu(monkeypatch: pytest.MonkeyPatch, major: int, backend: str) -> None:
    assert chosen(monkeypatch, *ATTENTION, "cuda", major) == backend


# A capability with and one without a preference for Triton in attention.
@pytest.mark.parametrize("major", [8, 9])
def test_other_operators_on_a_gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    assert chosen(monkeypatch, *VOCABULARY, "cuda", major) == "cuda"


# One operator on attention and one on logits: they are chosen by different rules.
@pytest.mark.parametrize("work", [ATTENTION, VOCABULARY])
def test_kernels_are_not_emulated_unasked(monkeypatch: pytest.MonkeyPatch, work: tuple[str, int]) -> None:
    assert chosen(monkeypatch, *work, "cpu") == "torch"


def test_a_named_backend_that_cannot_serve_says_why_and_who_can(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"token_logprobs has no cuda implementation.*Here torch can"):
        dispatch.resolve("token_logprobs", "cuda", torch.device("cpu"), torch.float32)
    monkeypatch.setenv("APPO_BACKEND", "cuda")
    with pytest.raises(ValueError, match="got 'cuda'"):
        dispatch.resolve("token_logprobs", "auto", torch.device("cpu"), torch.float32)
    assert dispatch.resolve("token_logprobs", "torch", torch.device("cpu"), torch.float32) == "torch"
    monkeypatch.setenv("APPO_BACKEND", "fast")
    with pytest.raises(ValueError, match="expected one of auto, torch, triton, cuda, got 'fast'"):
        dispatch.resolve("token_logprobs", "auto", torch.device("cpu"), torch.float32)
