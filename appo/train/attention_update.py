"""Policy gradient on attention inside an update: mass with its gradient out of the training forward (RAL)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from appo.config import APPOConfig
from appo.recording.recorder import FrameMassRecorder
from appo.train.groups import Part, ResponseBatch, known
from appo.train.packing import Sequences
from appo.train.policy import Policy
from appo_kernels import SurrogateOutput

# (mass, old_mass, advantages=, mask=, aggregation=, num_items=, max_length=) -> loss () and what is logged of it ()
AttentionLoss = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class AttentionUpdate:
    """Records the mass of one forward and adds its loss to the surrogate's."""

    recorder: FrameMassRecorder
    old_mass: Tensor  # (B, N, F) as scored
    sequences: Sequences
    mask: Tensor  # (B, N) bool
    coefficient: float
    attention_loss: AttentionLoss

    def added(self, result: SurrogateOutput, loss_arguments: dict[str, Any]) -> SurrogateOutput:
        """``result`` with this loss, inside the recorded forward; metric ``attention_divergence``."""
        names = ("advantages", "aggregation", "num_items", "max_length")
        arguments = {name: loss_arguments[name] for name in names}
        mass = self.sequences.per_response(self.recorder.mass)
        loss, divergence = self.attention_loss(mass, self.old_mass, mask=self.mask, **arguments)
        metrics = result.metrics | {"attention_divergence": divergence}
        return SurrogateOutput(result.loss + self.coefficient * loss, metrics)


def attention_update(
    parts: Sequence[Part],
    batch: ResponseBatch,
    sequences: Sequences,
    policy: Policy,
    config: APPOConfig,
    attention_loss: AttentionLoss,
) -> AttentionUpdate | None:
    """An update's part of attention; None where the settings do not ask for it, and for responses without frames or
    tokens."""
    if config.attention_coef == 0 or batch.prompts.num_frames == 0 or not sequences.rows.numel():
        return None
    recorder = policy.recorder(sequences, config, gradient=True)
    old_mass = _old_mass(parts, batch.prompts.num_frames).to(batch.mask.device)
    return AttentionUpdate(recorder, old_mass, sequences, batch.mask, config.attention_coef, attention_loss)


def _old_mass(parts: Sequence[Part], num_frames: int) -> Tensor:
    """(B, N, F) as scored; 0 for frames that a part's prompt does not have."""
    found = []
    for part in parts:
        group = part.group
        mass = known(group.mass) if group.prompt.num_frames else torch.zeros(*group.mask.shape, 0)
        found.append(pad(part.take(mass), (0, num_frames - mass.shape[-1])))
    longest = max(mass.shape[1] for mass in found)
    return torch.cat([pad(mass, (0, 0, 0, longest - mass.shape[1])) for mass in found])
