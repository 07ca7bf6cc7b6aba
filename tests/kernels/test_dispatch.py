"""Which backend "auto" takes, on machines that are not here: every backend says yes, and the device is made up."""

import pytest
import torch

import appo_kernels
from appo_kernels import backend_order, dispatch, doctor

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


def write(path, *lines: str) -> None:
    path.write_text("\n".join(["operator,dtype,architecture,most_scores,order", *lines]) + "\n")


def test_measured_orders_stand_before_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """By size: CUDA up to a million scores, Triton beyond and where the size is not known; other dtypes as before."""
    path = tmp_path / "h100.order.csv"
    write(path, "frame_attention,bfloat16,9.0,1000000,cuda triton", "frame_attention,bfloat16,9,,triton")
    monkeypatch.setenv(backend_order.FILE, str(path))
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def order(scores: int, dtype: torch.dtype = torch.bfloat16) -> tuple[str, ...]:
        return backend_order.order("frame_attention", dtype, device, scores)

    assert order(1_000_000) == ("cuda", "triton", "torch")
    assert order(1_000_001) == order(0) == ("triton", "cuda", "torch")
    assert order(5, torch.float16) == ("triton", "cuda", "torch")  # of the table
    assert chosen(monkeypatch, *VOCABULARY, "cuda", 9) == "cuda"
    monkeypatch.delenv(backend_order.FILE)
    assert order(5) == ("triton", "cuda", "torch")


# Each column wrong, a header that is another, a file that is not there.
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["frame_mass,*,9,,fast"], r"line 2: `order`: expected backends of cuda, triton, torch, each once, got 'fast'"),
        (["*,*,*,,cuda", "*,*,*,,cuda cuda"], "line 3: `order`"),
        (["frame_mass,*,9,many,cuda"], r"line 2: `most_scores`: expected a number above 0.*got 'many'"),
        (["frame_mass,*,9,0,cuda"], "line 2: `most_scores`"),
        (None, "expected a file that can be read"),
    ],
)
def test_a_file_of_orders_that_is_wrong_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path, lines, message) -> None:
    path = tmp_path / "order.csv"
    if lines is not None:
        write(path, *lines)
    monkeypatch.setenv(backend_order.FILE, str(path))
    with pytest.raises(ValueError, match=message):
        backend_order.order("frame_mass", torch.float32, torch.device("cpu"))
    path.write_text("operator,order\nframe_mass,cuda\n")
    backend_order.read.cache_clear()
    with pytest.raises(ValueError, match="expected the columns operator,dtype,architecture,most_scores,order"):
        backend_order.order("frame_mass", torch.float32, torch.device("cpu"))


def test_rules_are_written_as_they_are_read(tmp_path) -> None:
    """Two sizes with one order and a third with another: the border half way, on a scale of factors."""
    times = {100: {"cuda": 1.0, "triton": 2.0}, 400: {"cuda": 1.0, "triton": 1.1}, 6400: {"cuda": 9.0, "triton": 5.0}}
    rules = tuple(backend_order.measured("frame_mass", "bfloat16", "9.0", times))
    assert [(rule.most_scores, rule.order) for rule in rules] == [
        (1600, ("cuda", "triton")),
        (float("inf"), ("triton", "cuda")),
    ]
    backend_order.write(tmp_path / "order.csv", rules)
    assert backend_order.read(tmp_path / "order.csv") == rules


def test_a_call_says_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(backend_order, "order", lambda *call: asked.append(call) or ("torch",))
    dispatch._automatic.cache_clear()
    query, key = torch.randn(1, 2, 3, 32), torch.randn(1, 1, 5, 32)
    appo_kernels.frame_mass(query, key, torch.zeros(1, 5, dtype=torch.int32), num_frames=1)
    assert asked == [("frame_mass", torch.float32, torch.device("cpu"), 32)]  # 2 x 3 x 5, rounded up
    dispatch._automatic.cache_clear()


def test_the_doctor_prints_the_rules(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    write(tmp_path / "order.csv", "frame_mass,bfloat16,9.0,1600,cuda triton")
    monkeypatch.setenv(backend_order.FILE, str(tmp_path / "order.csv"))
    lines = doctor.order_lines()
    assert str(tmp_path) in lines[0]
    assert "frame_mass" in lines[2] and "up to 1,600 scores" in lines[2] and "cuda, triton" in lines[2]
    assert len(lines) == 3 + len(backend_order.TABLE)
