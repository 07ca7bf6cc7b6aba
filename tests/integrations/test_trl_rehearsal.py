"""A training step of TRL's trainer with ours on the pretended GPU: nothing a GPU refuses, at a known cost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("trl", reason="TRL is not installed: `make test-integrations` has an environment with it")
pytest.importorskip("datasets", reason="TRL needs datasets: `make test-integrations`")

import test_trl as shared
import transformers
import trl
from accelerate.state import AcceleratorState

import gpu_rehearsal
from appo.integrations.trl import APPOTrainer
from gpu_rehearsal import budgets
from gpu_rehearsal.recording import SYNC, UPLOAD, Recording

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TRL, TRANSFORMERS = (package.__version__.rsplit(".", 1)[0] for package in (trl, transformers))
LINE = f"APPOTrainer, TRL {TRL}, transformers {TRANSFORMERS}"
TOKENS = 12


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """accelerate keeps its device for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def second_step(folder: Path, **changes: Any) -> tuple[Recording, dict[str, float]]:
    """The second step of two, sampling included, and its metrics."""
    with gpu_rehearsal.rehearse() as recording:
        trainer = shared.trainer(
            folder, cls=APPOTrainer, use_cpu=False, bf16=True, gradient_accumulation_steps=1, **changes
        )  # fmt: skip
        assert trainer.accelerator.device.type == "cuda"
        step = trainer.training_step

        def recorded(*arguments: Any, **options: Any) -> Any:
            recording.clear()
            return step(*arguments, **options)

        with mock.patch.object(trainer, "training_step", recorded):
            trainer.train()
    return recording, trainer.state.log_history[-2]


def test_a_step(tmp_path: Path, on_gpu: None) -> None:
    recording, metrics = second_step(tmp_path)
    assert not budgets.refused([recording]), recording.report()
    assert metrics["grad_norm"] > 0 and metrics["appo/weight_mean"] > 1 and metrics["appo/target_frames"] > 0
    kernels = {launch.kernel for launch in recording.launches}
    assert {"mass_from_lse_kernel", "fold_kernel", "terms_kernel", "gradient_kernel"} <= kernels
    cost = budgets.of_step(recording)
    if LINE not in budgets.read():
        pytest.skip(f"budgets.txt has no line for these versions: {budgets.line(LINE, cost)}")
    assert not budgets.risen(LINE, cost), f"{budgets.line(LINE, cost)}\n{recording.report()}"


def test_tokens_cost_no_upload(tmp_path: Path, on_gpu: None) -> None:
    """Twice the tokens in each response: not one upload more, and no wait but sampling's, one for each."""
    found = []
    for tokens in (TOKENS, 2 * TOKENS):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        found.append(second_step(folder, max_completion_length=tokens)[0])
    assert not budgets.new_by_place(*found, UPLOAD)
    waits = budgets.new_by_place(*found, SYNC)
    assert sum(after - before for before, after in waits.values()) <= TOKENS, waits
