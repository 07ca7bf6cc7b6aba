"""A training step of TRL's trainer with ours on the pretended GPU: nothing a GPU refuses, at a known cost."""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: `make test-integrations` has an environment with it")
pytest.importorskip("datasets", reason="TRL needs datasets: `make test-integrations`")

import test_trl as shared
import trl
from accelerate.state import AcceleratorState, PartialState

import gpu_rehearsal
from appo.integrations.trl import APPOTrainer
from gpu_rehearsal import budgets
from gpu_rehearsal.recording import SYNC, UPLOAD, Recording
from gpu_rehearsal.tensors import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
LINE = f"APPOTrainer step, TRL {trl.__version__.rsplit('.', 1)[0]}"


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """accelerate keeps its device for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def second_step(folder: Path, **changes: Any) -> tuple[Recording, dict[str, float]]:
    """What the second step of two does, and its metrics."""
    with gpu_rehearsal.rehearse() as recording:
        trainer = shared.trainer(
            folder, cls=APPOTrainer, use_cpu=False, bf16=True, num_iterations=1, gradient_accumulation_steps=1, **changes
        )
        assert trainer.accelerator.device == DEVICE
        step = trainer.training_step

        def recorded(*arguments: Any, **options: Any) -> Any:
            recording.clear()
            return step(*arguments, **options)

        with mock.patch.object(trainer, "training_step", recorded):
            trainer.train()
    return recording, trainer.state.log_history[-2]


def test_a_step(tmp_path: Path, on_gpu: None) -> None:
    recording, metrics = second_step(tmp_path)
    print(recording.report())
    print(metrics)
    assert not budgets.refused([recording]), recording.report()
