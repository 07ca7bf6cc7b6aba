"""Planted faults are caught, each by what it must be caught by; sources without a fault pass all of these checks."""

from pathlib import Path

import pytest
import torch
from attention_cases import case
from attention_layouts import FRAMES
from planted_faults import FAULTS, Fault, planted

from appo_kernels import frame_attention, frame_mass, group_divergence_from_logits, logits_weighted_surrogate
from cudasim.library import build
from cudasim.replay import Call, Outcome, play, record

KERNELS = {
    "frame_attention": ("frame_attention.cu", "head_mean.cu", "library.cu"),
    "frame_mass": ("frame_mass.cu", "head_mean.cu", "library.cu"),
    "backward": ("frame_attention.cu", "head_mean.cu", "attention_backward.cu", "library.cu"),
    "surrogate": ("weighted_surrogate.cu", "library.cu"),
    "divergence": ("group_divergence.cu", "library.cu"),
}
SEEDS = (0, 1, 2, 3, 4, 5)
FLAGS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "race": ("-fsanitize=thread",),
}
PRELOAD = {"address": "libasan.so", "race": "libtsan.so"}


def run_frame_attention() -> None:
    # Two blocks of rows, four tiles of keys with a remainder; no last_key: the last key is the kernel's to find.
    example = case(batch=1, heads=(2, 2), rows=70, keys=201, head_dim=64, layout="interleaved", visibility="all")
    frame_attention(*(t.bfloat16() for t in example[:3]), example.frame_ids, num_frames=FRAMES, backend="cuda")


def run_frame_mass() -> None:
    # One tile of keys a head: every stage is of another head.
    example = case(batch=1, heads=(6, 2), rows=20, keys=60, head_dim=64, layout="equal", visibility="all")
    lse = torch.full((1, 6, 20), 5.0)
    query, key = example.query.bfloat16(), example.key.bfloat16()
    frame_mass(query, key, example.frame_ids, num_frames=FRAMES, lse=lse, backend="cuda")


def run_backward() -> None:
    # Two blocks of rows and two of keys, both cut; grouped heads; without a gradient of the mass, then with one.
    example = case(
        batch=1, heads=(2, 1), rows=70, keys=101, head_dim=64, layout="interleaved", visibility="left padding"
    )
    example = example.to(torch.bfloat16)
    output = frame_attention(*example[:4], num_frames=FRAMES, backend="cuda", **example.bounds)
    torch.autograd.grad(output.out.float().sum(), example[:3], retain_graph=True)
    (output.out.float().sum() + output.lse[..., 4:].sum() + output.mass[..., 0].sum()).backward()


def run_surrogate() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 1003, generator=generator).bfloat16().requires_grad_()  # rows at odd addresses
    targets = torch.randint(1003, (1, 3), generator=generator)
    old, advantages = torch.full((1, 3), -7.0), torch.ones(1)
    logits_weighted_surrogate(logits, targets, old, advantages, torch.ones(1, 3), backend="cuda")


def run_divergence() -> None:
    logits = torch.randn(3, 4, 1000, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([0, 1, -1]).view(1, 3, 1)
    group_divergence_from_logits(logits, logits.logsumexp(-1), slots, backend="cuda")


RUNS = {
    "frame_attention": run_frame_attention,
    "frame_mass": run_frame_mass,
    "backward": run_backward,
    "surrogate": run_surrogate,
    "divergence": run_divergence,
}


@pytest.fixture
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return record(RUNS[request.param], monkeypatch)


def outcome(fault: Fault | None, operator: str, kind: str, calls: list[Call], folder: Path) -> Outcome:
    library = build(planted(fault, folder), flags=FLAGS.get(kind, ()), kernels=KERNELS[operator])
    seeds = SEEDS if kind == "schedule" else (0,)
    return play(library, calls, folder, seeds=seeds, preload=PRELOAD.get(kind))


def check_caught(fault: Fault, result: Outcome) -> None:
    if fault.caught_by == "address":
        assert "AddressSanitizer: heap-buffer-overflow" in result.output, result.output
    elif fault.caught_by == "race":
        assert "ThreadSanitizer: data race" in result.output, result.output
    elif fault.caught_by == "counters":
        assert not result.failures and result.counters["bank_conflicts"] > 0
    else:
        assert result.failures, "the fault passed unnoticed"
        if fault.message:
            assert fault.message in result.failures[0]


@pytest.mark.parametrize(
    ("calls", "fault"),
    [
        pytest.param(f.operator, f, id=f.name, marks=pytest.mark.slow if f.slow else ()) for f in FAULTS
    ],
    indirect=["calls"],
)  # fmt: skip
def test_fault_is_caught(calls: list[Call], fault: Fault, tmp_path: Path) -> None:
    check_caught(fault, outcome(fault, fault.operator, fault.caught_by, calls, tmp_path))


# Every recorded operator, without a fault: what the checks below must stay silent on.
@pytest.mark.parametrize(("calls", "operator"), [(name, name) for name in RUNS], indirect=["calls"])
def test_no_false_alarm(calls: list[Call], operator: str, tmp_path: Path) -> None:
    result = outcome(None, operator, "schedule", calls, tmp_path)
    assert result.returncode == 0 and not result.failures, result.output
    if operator.startswith(("frame", "backward")):
        assert result.counters["bank_conflicts"] == 0


# Both sanitizers, which need builds of their own, over every recorded operator.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "race"])
@pytest.mark.parametrize(("calls", "operator"), [(name, name) for name in RUNS], indirect=["calls"])
def test_sanitizers_find_nothing(calls: list[Call], operator: str, kind: str, tmp_path: Path) -> None:
    """AddressSanitizer with UBSan, and ThreadSanitizer, over every kernel."""
    result = outcome(None, operator, kind, calls, tmp_path)
    assert result.returncode == 0 and not result.failures and "Sanitizer" not in result.output, result.output
