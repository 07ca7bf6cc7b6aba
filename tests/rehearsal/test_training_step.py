"""Whole training steps on the pretended GPU: nothing a GPU refuses, nothing uploaded for each token."""

import pytest
import torch
import training
import transformers
from accelerate.state import AcceleratorState, PartialState

import gpu_rehearsal
from appo.train.trainer import Trainer
from gpu_rehearsal import budgets
from gpu_rehearsal.recording import SYNC, UPLOAD, Recording
from gpu_rehearsal.tensors import DEVICE

LINE = f"Trainer.step, transformers {transformers.__version__.rsplit('.', 1)[0]}"


@pytest.fixture
def on_gpu():
    """accelerate keeps its device for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState().device = DEVICE
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def second_step(folder, **changes) -> tuple[Recording, dict]:
    torch.manual_seed(0)
    model, processor = training.tiny()
    settings = {"max_steps": 2, "dtype": "bfloat16", "temperature": 1.0} | changes
    with gpu_rehearsal.rehearse() as recording:
        trainer = Trainer(model, processor, training.records(), config=training.config(folder, **settings))
        assert trainer.accelerator.device == DEVICE
        for number in (1, 2):
            recording.clear()
            metrics = trainer.step(number)
    return recording, metrics


def test_a_step(tmp_path, on_gpu):
    recording, metrics = second_step(tmp_path)
    cost = budgets.of_step(recording)
    assert not budgets.refused([recording]), recording.report()
    assert metrics["grad_norm"] > 0 and metrics["weight/max"] > 1 and 0 < metrics["mass/frames"] < 1
    # Two engines agree: sampling attends through torch's SDPA, scoring through the stand-in of flash attention.
    assert metrics["engine/logprob_diff"] < 0.02
    kernels = {launch.kernel for launch in recording.launches}
    assert kernels, "the step launched no kernel of ours"
    if LINE not in budgets.read():
        pytest.skip(f"budgets.txt has no line for this transformers: {budgets.line(LINE, cost)}")
    assert not budgets.risen(LINE, cost), f"{budgets.line(LINE, cost)}\n{recording.report()}"


def test_tokens_cost_no_upload_and_no_wait(tmp_path, on_gpu):
    """Twenty tokens more in each response: not one upload more, and at most a wait for each."""
    found = []
    for tokens in (12, 32):
        recording, metrics = second_step(tmp_path / str(tokens), max_new_tokens=tokens, prompts_per_step=1, seed=1)
        assert "grad_norm" in metrics, "the group has no signal: take another seed"
        found.append(recording)
    assert not budgets.new_by_place(*found, UPLOAD), "uploaded for each token"
    waits = budgets.new_by_place(*found, SYNC)
    assert sum(after - before for before, after in waits.values()) <= 22, waits
