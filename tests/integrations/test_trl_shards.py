"""TRL's trainer with ours under accelerate's FSDP2, in two gloo processes on a CPU: shards, one process's numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is not installed: `make test-integrations` has an environment with it")
pytest.importorskip("datasets", reason="TRL needs datasets: `make test-integrations`")

import test_trl as shared
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor
from two_processes import run_two

from appo.integrations.trl import APPOTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
RATE = 0.1
# Plain descent by the gradient as it is: the steps are compared with one process's.
DESCENT: dict[str, Any] = {
    "optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 2,
    "gradient_accumulation_steps": 1,
}  # fmt: skip
LAYERS = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": LAYERS}}


class Kept(APPOTrainer):
    """Keeps every micro-batch, its loss, and which responses were right."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        self.seen.append((inputs, float(loss.detach()), self._accuracy))
        return loss


def shards_on_a_cpu() -> None:
    """accelerate shards on accelerators alone; FSDP2 itself does on a CPU as well."""
    plain = AcceleratorState.__init__

    def with_shards(self: Any, *args: Any, fsdp_plugin: Any = None, **others: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **others)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_shards


def one_of_two(folder: Path, rank: int) -> None:
    shards_on_a_cpu()
    made = shared.trainer(folder, "video", cls=Kept, **DESCENT, **SHARDED)
    # The responses of one process end before those of the other, which needs the layers of both.
    made.generation_config.max_new_tokens = (12, 7)[rank]
    made.train()
    named = dict(made.model.named_parameters())
    held = {name: tuple(p.to_local().shape) for name, p in named.items() if isinstance(p, DTensor)}
    whole = {name: p.full_tensor() for name, p in named.items() if isinstance(p, DTensor)}
    torch.save((made.seen, held, whole), folder / f"{rank}.pt")


def test_shards_weigh_and_train_as_one_process(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, test_trl_shards as own\n"
        "own.one_of_two(pathlib.Path(sys.argv[1]), int(os.environ['RANK']))"
    )
    ends = run_two("-W", "ignore", "-c", script, str(tmp_path), timeout=280)
    assert [status for status, _ in ends] == [0, 0], ends
    seen, held, whole = zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)), strict=True)
    made = shared.trainer(tmp_path, cls=APPOTrainer, **DESCENT)
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    named = dict(made.model.named_parameters())
    for name, parameter in named.items():  # along the first dimension, in two parts
        assert held[0][name][0] + held[1][name][0] == len(parameter), name
        assert max(len(parameter) - half[name][0] for half in held) < len(parameter) or len(parameter) == 1
    start = torch.cat([parameter.detach().flatten() for parameter in named.values()])
    for steps in zip(*seen, strict=True):
        assert [inputs["completion_ids"].shape[1] for inputs, *_ in steps] == [12, 7]
        for inputs, loss, accuracy in steps:
            made._media, made._accuracy = inputs["media"], accuracy
            found = made._score(inputs)
            torch.testing.assert_close(inputs["token_weights"], found.weights, rtol=1e-4, atol=1e-5)
            assert float(found.weights.max()) > 1.1
            # One process counts the tokens of both, whose gradients are averaged.
            own = made._compute_loss(made.model, inputs | {"num_items_in_batch": inputs["num_items_in_batch"] / 2})
            assert abs(loss - float(own)) <= 1e-6, (loss, float(own))
            (own / 2).backward()
        with torch.no_grad():
            for parameter in named.values():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
                    parameter.grad = None
    alone = torch.cat([parameter.detach().flatten() for parameter in named.values()])
    for trained in whole:
        moved = torch.cat([trained[name].flatten() for name in named])
        assert float((moved - start).norm()) > 0.1
        assert float((moved - alone).norm()) <= 1e-5 * float((moved - start).norm())
