"""TRL's trainer with ours in two gloo processes on a CPU: the same losses, one model, no group that is split."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is not installed: `make test-integrations` has an environment with it")
pytest.importorskip("datasets", reason="TRL needs datasets: `make test-integrations`")

from trl import GRPOTrainer
from two_processes import run_two

from appo.integrations.trl import APPOTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

SCRIPT = """
import json, sys
from pathlib import Path
import torch
import test_trl as shared
import test_trl_processes as own
from appo.models.loaded import vision_token_ids
folder, name, kind, changes = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
if changes.pop("lora", False):
    from peft import LoraConfig
    changes["peft"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
made = shared.trainer(folder, kind, cls=own.CLASSES[name], **changes)
# TRL would sample tokens of videos, which ours never does, and with them other responses.
made.generation_config.suppress_tokens = vision_token_ids(made.accelerator.unwrap_model(made.model), made._tokenizer)
made.train()
flat = torch.cat([p.detach().flatten() for p in made.model.parameters() if p.requires_grad])
torch.save((flat, [one[1:] for one in made.seen]), folder / f"{name}-{made.accelerator.process_index}.pt")
"""


class BothLosses(APPOTrainer):
    """Keeps both losses, without gradients: under DistributedDataParallel these are for the one backward."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ours = super()._compute_loss(model, inputs)
        with torch.no_grad():
            theirs = GRPOTrainer._compute_loss(self, self.model, inputs)
        self.seen.append((inputs, float(ours.detach()), float(theirs)))
        return ours


CLASSES = {"both": BothLosses, "appo": APPOTrainer, "trl": GRPOTrainer}


def processes(folder: Path, name: str, kind: str, **changes: Any) -> list[tuple[int, str]]:
    """Exit status and output of two processes."""
    return run_two("-c", SCRIPT, str(folder), name, kind, json.dumps(changes), timeout=280)


def trained(folder: Path, name: str, kind: str, **changes: Any) -> list[Any]:
    ends = processes(folder, name, kind, **changes)
    assert [status for status, _ in ends] == [0, 0], ends
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]


# "dapo" divides by the tokens of all processes, "grpo" by responses: averaged gradients are to be the whole batch's.
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_weighted_losses_are_trls_and_the_model_one(loss_type: str, tmp_path: Path) -> None:
    first, second = trained(tmp_path, "both", "video", loss_type=loss_type, gradient_accumulation_steps=1)
    assert torch.equal(first[0], second[0]), "the same weights in both"
    for _, seen in (first, second):
        assert len(seen) == 2 and all(abs(ours - theirs) < 1e-6 for ours, theirs in seen), seen


# W = 1 (no video), at a temperature of 0.9 and over two micro-batches: hooks of DDP, and of adapters within it.
@pytest.mark.parametrize("lora", [False, True])
def test_the_trained_model_is_trls(lora: bool, tmp_path: Path) -> None:
    # Plain descent: the steps of an optimizer that divides by the gradient's size hide what is small.
    changes = {"optim": "sgd", "learning_rate": 0.1, "num_iterations": 2, "lora": lora}
    ours, theirs = (trained(tmp_path, name, "text", **changes)[0][0] for name in ("appo", "trl"))
    start = trained(tmp_path, "appo", "text", **(changes | {"learning_rate": 1e-12}))[0][0]
    moved = float((theirs - start).norm())
    assert moved > 0 and float((ours - theirs).norm()) <= 1e-4 * moved


def test_groups_that_straddle_processes_are_refused_in_each(tmp_path: Path) -> None:
    """A batch of 4 responses in two processes is one group of 4, which TRL takes."""
    ends = processes(tmp_path, "appo", "video", per_device_train_batch_size=2, gradient_accumulation_steps=1)
    for status, output in ends:
        assert status == 1
        assert (
            "ValueError: `args`: expected per_device_train_batch_size * steps_per_generation = 2 to be a multiple of "
            "num_generations = 4, so that no group straddles processes. Change one of them."
        ) in output
