"""Optimizer steps on gradients that are finite; the others change nothing and are counted."""

import logging
import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from appo.config import APPOConfig
from appo.train.groups import Group
from appo.train.logs import Meter
from appo.train.setup import build_optimizer
from appo.train.sharding import own, sum_over_shards

logger = logging.getLogger("appo")


class NonFiniteError(RuntimeError):
    """Numbers of the training that are not finite: the message says which, and what the steps before were."""


def shares(groups: Sequence[Group], most: int) -> list[list[Group]]:
    """The groups of this process in each of at most ``most`` updates; every process calls it.

    Groups of all processes are dealt out in one order, scored ones first, so that updates are those that one process
    would make. Each has a scored group in some process; a process may have none of it.
    """
    order = sorted(gather_object([(not group.scored, group.place) for group in groups]))
    updates = min(most, sum(not unscored for unscored, _ in order))
    turns = {place: turn for turn, (_, place) in enumerate(order)}
    return [[group for group in groups if turns[group.place] % updates == update] for update in range(updates)]


def clip_gradients(policy: nn.Module, most: float) -> float:
    """Scale the gradients of all processes down to a norm of ``most``, as torch's `clip_grad_norm_`; their norm before.

    Squares are summed in fp64: fp32 sums would round otherwise in shards than in the whole.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradients = [own(parameter.grad) for parameter in trained if parameter.grad is not None]
    squares = torch.zeros((), dtype=torch.float64, device=own(trained[0]).device)
    for gradient in gradients:
        squares += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    sum_over_shards(squares, trained[0])
    norm = float(squares.sqrt())
    if most < norm < math.inf:
        torch._foreach_mul_(gradients, most / (norm + 1e-6))
    return norm


class Updates:
    """The optimizer of a policy: ``policy`` is ``unwrapped`` inside what synchronises or shards it, as it is called."""

    def __init__(self, unwrapped: nn.Module, policy: nn.Module, accelerator: Accelerator, config: APPOConfig) -> None:
        self.unwrapped, self.policy, self.accelerator, self.config = unwrapped, policy, accelerator, config
        self.optimizer = build_optimizer(unwrapped, config)
        # fp16 gradients are scaled up, or small ones would be 0.
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.dtype == "float16")
        self._skipped: list[str] = []  # those in a row

    def set_rate(self, rate: float) -> None:
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(self.scaler.scale(loss))

    def apply(self, step: int, loss: float, meter: Meter) -> bool:
        """An optimizer step on the gradients there are, clipped; whether it was made.

        loss: that of all processes. Raises NonFiniteError when it was not made ``max_skipped`` times in a row, and when
        the weights are not finite after it.
        """
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.policy, self.config.max_grad_norm)
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite:
            self.skip(f"step {step}: loss {loss:g}, gradient norm {norm:g}", meter)
            return False
        self._skipped.clear()
        meter.add("grad_norm", norm)
        self.check_weights(f"after step {step}")
        return True

    def skip(self, what: str, meter: Meter) -> None:
        """Count an update that was not finite. Raises NonFiniteError after ``max_skipped`` in a row."""
        self._skipped.append(what)
        meter.total("updates/nonfinite", 1.0)
        logger.warning("update skipped: %s", what)
        if len(self._skipped) >= self.config.max_skipped:
            raise NonFiniteError(
                f"{len(self._skipped)} updates in a row were not finite, and were skipped: {'; '.join(self._skipped)}. "
                "The weights are those before them. Lower `learning_rate`, set `delta`, or look at samples.jsonl for "
                "what the model writes; `max_skipped` sets how many are borne."
            )

    def check_weights(self, when: str) -> None:
        """Raise NonFiniteError, in all processes, when a trained weight is not finite in any."""
        trained = {
            name: own(parameter) for name, parameter in self.unwrapped.named_parameters() if parameter.requires_grad
        }
        finite = torch.stack([value.isfinite().all() for value in trained.values()])
        if float(self.accelerator.reduce((~finite).any().float().to(self.accelerator.device), "sum")) > 0:
            found = [name for name, ok in zip(trained, finite.tolist(), strict=True) if not ok] or ["another process's"]
            raise NonFiniteError(
                f"{found[0]} is not finite {when}. It is not saved; older checkpoints are as they were. Lower "
                "`learning_rate`, or look at the weights the run started from."
            )
