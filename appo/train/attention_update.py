"""Policy gradient on attention inside an update: mass with its gradient out of the training forward (RAL)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from appo.config import APPOConfig
from appo.recording.hooks import last_layers
from appo.recording.recorder import record_frame_mass
from appo.train.groups import Part, ResponseBatch, known
from appo.train.packing import Sequences
from appo.train.policy import Policy
from appo_kernels import SurrogateOutput

# (mass, old_mass, advantages=, mask=, aggregation=, num_items=, max_length=) -> loss () and what is logged of it ()
AttentionLoss = Callable[..., tuple[Tensor, Tensor]]


class AttentionUpdate:
    """Records the mass of one forward and adds its loss to the surrogate's."""

    def __init__(
        self,
        parts: Sequence[Part],
        batch: ResponseBatch,
        sequences: Sequences,
        policy: Policy,
        config: APPOConfig,
        attention_loss: AttentionLoss,
    ) -> None:
        self.sequences, self.batch, self.coefficient = sequences, batch, config.attention_coef
        self.attention_loss = attention_loss
        self.recorder: Any = record_frame_mass(
            policy.model,
            sequences.frame_ids,
            rows=sequences.rows,
            layers=last_layers(policy.model, config.layers),
            reduction=config.mass_reduction,
            gradient=True,
        )
        self.old_mass = _old_mass(parts, batch.prompts.num_frames).to(batch.mask.device)

    def added(self, result: SurrogateOutput, loss_arguments: dict[str, Any]) -> SurrogateOutput:
        """``result`` with this loss, inside the recorded forward; metric ``attention_divergence``."""
        names = ("advantages", "aggregation", "num_items", "max_length")
        arguments = {name: loss_arguments[name] for name in names}
        mass = self.sequences.per_response(self.recorder.mass)
        loss, divergence = self.attention_loss(mass, self.old_mass, mask=self.batch.mask, **arguments)
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
    """None where the settings do not ask for it, and for responses without frames or tokens."""
    if config.attention_coef == 0 or batch.prompts.num_frames == 0 or not sequences.rows.numel():
        return None
    return AttentionUpdate(parts, batch, sequences, policy, config, attention_loss)


def _old_mass(parts: Sequence[Part], num_frames: int) -> Tensor:
    """(B, N, F) as scored; 0 for frames that a part's prompt does not have."""
    found = []
    for part in parts:
        group = part.group
        mass = known(group.mass) if group.prompt.num_frames else torch.zeros(*group.mask.shape, 0)
        found.append(pad(part.take(mass), (0, num_frames - mass.shape[-1])))
    longest = max(mass.shape[1] for mass in found)
    return torch.cat([pad(mass, (0, 0, 0, longest - mass.shape[1])) for mass in found])
