"""The pretended GPU itself: real values, and everything that a GPU makes expensive or refuses is seen."""

import pytest
import torch
from torch import Tensor

import gpu_rehearsal
from appo_kernels import frame_attention, group_attention
from appo_kernels.attention.group_layout import GroupLayout
from gpu_rehearsal.recording import MIXED, REFUSED, SYNC, UPLOAD, Recording


def matrix() -> Tensor:
    return torch.arange(12.0, device="cuda").view(3, 4)


# The ways in which code waits for a GPU, or sends something to it.
EVENTS = {
    "item": (lambda x: x.sum().item(), [SYNC]),
    "bool of a tensor": (lambda x: bool((x > 3).any()), [SYNC]),
    "int of a tensor": (lambda x: int(x[0, 1]), [SYNC]),
    "tolist": (lambda x: x.tolist(), [SYNC]),
    "cpu": (lambda x: x.cpu(), [SYNC]),
    "to another device": (lambda x: x.to("cpu"), [SYNC]),
    "nonzero": (lambda x: x.nonzero(), [SYNC]),
    "where of one argument": (lambda x: torch.where(x > 3), [SYNC]),
    "a mask as an index": (lambda x: x[x > 3], [SYNC]),
    "writing through a mask": (lambda x: x.__setitem__(x > 3, 0.0), [SYNC]),
    "masked_select": (lambda x: x.masked_select(x > 3), [SYNC]),
    "unique": (lambda x: x.unique(), [SYNC]),
    "repeats counted on the GPU": (lambda x: x[0].repeat_interleave(x[0].long()), [SYNC]),
    "synchronize": (lambda x: torch.cuda.synchronize(), [SYNC]),
    "copy_ to the host": (lambda x: torch.empty(3, 4).copy_(x), [SYNC]),
    "a list": (lambda x: torch.tensor([1.0, 2.0], device="cuda"), [UPLOAD]),
    "a host tensor": (lambda x: torch.ones(3).to("cuda"), [UPLOAD]),
    "cuda()": (lambda x: torch.ones(3).cuda(), [UPLOAD]),
    "copy_ to the GPU": (lambda x: x.copy_(torch.ones(3, 4)), [UPLOAD]),
    "an index on the host": (lambda x: x[torch.tensor([0, 2])], [UPLOAD]),
    "operands of two devices": (lambda x: x + torch.ones(3, 4), [MIXED]),
    "a product of two devices": (lambda x: x[:, None] @ torch.ones(4, 8), [MIXED]),
    "arithmetic": (lambda x: (x * 2 + 1).sum(1).softmax(0), []),
    "a number from the host": (lambda x: x + torch.tensor(2.0), []),
    "a counted repetition": (lambda x: x.repeat_interleave(2, 0), []),
    "slices and index tensors": (lambda x: x[1:, torch.arange(2, device="cuda")], []),
    "new tensors": (lambda x: x.new_zeros(3) + torch.zeros(3, device="cuda") + torch.ones(3, device=x.device), []),
}  # fmt: skip


@pytest.mark.parametrize("name", EVENTS)
def test_event(name):
    act, expected = EVENTS[name]
    with gpu_rehearsal.rehearse() as recording:
        x = matrix()
        recording.clear()
        act(x)
    assert [event.kind for event in recording.events] == expected, recording.report()
    assert all(event.where.startswith("tests/rehearsal/test_pretended_gpu.py:") for event in recording.events)


def test_values_are_those_of_the_host():
    def work(device: str) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(3)
        x = torch.randn(4, 5, generator=generator, device=device, requires_grad=True)
        y = (x.softmax(-1).log() * torch.eye(5, device=device)[:4]).sum()
        y.backward()
        kept = x.detach()[x.detach() > 0]
        return [y.detach(), x.grad, kept, torch.cat([kept, kept.new_ones(2)]).sort().values]

    with gpu_rehearsal.rehearse():
        got = [t.cpu() for t in work("cuda")]
        assert all(t.device.type == "cpu" for t in got)
    for a, b in zip(got, work("cpu"), strict=True):
        assert torch.equal(a, b)


def test_device_of_results():
    with gpu_rehearsal.rehearse():
        x = matrix()
        for made in (x + 1, x.sum(), x[0], x.new_empty(2), torch.zeros_like(x), x.to(torch.bfloat16), x.long()):
            assert made.device == torch.device("cuda:0") and made.is_cuda
        assert x.cpu().device.type == "cpu" and torch.zeros(2).device.type == "cpu"
        with pytest.raises(TypeError, match="cuda:0"):
            x.numpy()


def test_backward_stays_on_the_gpu():
    """Gradients that C++ makes by itself too: of an expanded sum, of another dtype, of something used twice."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(gradient)
            return gradient

    with gpu_rehearsal.rehearse() as recording:
        x = torch.randn(8, 8, device="cuda", requires_grad=True)
        y = Look.apply(x * 2).bfloat16()
        (y.float().sum() + (y.t() @ y).float().sum()).backward()
        assert seen[0].is_cuda and x.grad.is_cuda
    assert not recording.events, recording.report()


def test_what_is_not_recorded():
    with gpu_rehearsal.rehearse() as recording:
        with recording.pause():
            matrix().nonzero()
        assert not recording.events and not recording.trace
        matrix().nonzero()
    assert len(recording.of_kind(SYNC)) == 1 and recording.operations == 2  # arange, nonzero


def test_no_kernel_is_counted_for_views():
    with gpu_rehearsal.rehearse() as recording:
        x = matrix()
        recording.clear()
        _ = x.t()[1:].unsqueeze(0).contiguous, x.view(4, 3), x.float(), x.contiguous(), x.detach()
    assert recording.operations == 0 and recording.products == 0


def test_grids_are_checked():
    recording = Recording()
    recording.launch("kernel", (65_536,), (), {})
    assert not recording.events
    for grid in ((1, 65_536), (1, 1, 65_536), (2**31,), (0,)):
        recording.clear()
        recording.launch("kernel", grid, (), {})
        assert [event.kind for event in recording.events] == [REFUSED], grid


def test_a_host_tensor_in_a_launch_is_seen():
    from appo_kernels.vocabulary.triton_rows import fold, new_state

    with gpu_rehearsal.rehearse() as recording:
        logits, targets = torch.randn(3, 7, device="cuda"), torch.zeros(3, dtype=torch.int64)
        state = new_state(3, logits)
        recording.clear()
        fold(logits, targets, state)
    assert [event.kind for event in recording.events] == [
        MIXED
    ] * 2  # targets also stand for the bias that is not there
    assert recording.launches[0].kernel == "fold_kernel" and recording.launches[0].grid == (3,)


def test_operators_have_the_values_of_the_torch_backend():
    query, key, value = torch.randn(3, 1, 4, 20, 64).bfloat16()
    frames = (torch.arange(20) // 5)[None]
    with gpu_rehearsal.rehearse() as recording:
        inputs = [t.cuda() for t in (query, key, value, frames)]
        results = [frame_attention(*inputs, num_frames=4, backend=b) for b in ("torch", "triton", "cuda")]
        got = [[t.cpu() for t in result] for result in results]
    assert {launch.kernel for launch in recording.launches} >= {"online_kernel", "appo_frame_attention_forward"}
    for result in got:
        for a, b in zip(result, got[0], strict=True):
            assert torch.equal(a, b)


def test_flash_attention_of_the_vendor():
    """Its stand-in, forward and backward, against the torch backend of the CPU."""
    layout = GroupLayout([7], [[5, 3]])

    def work(device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        leaves = [
            torch.randn(1, heads, 15, 32, generator=generator).bfloat16().to(device).requires_grad_()
            for heads in (4, 2, 2)
        ]
        out, lse = group_attention(*leaves, layout, backend="torch")
        (out.float().sum() + (out.float() * lse[..., None]).sum()).backward()
        return [out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)]

    with gpu_rehearsal.rehearse():
        got = [t.cpu().float() for t in work("cuda")]
    for a, b in zip(got, work("cpu"), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=3e-2, atol=3e-2)
