"""What `benchmarks.learning` compares: GRPO, DAPO, APPO with each way of choosing frames, and controls that take away
one thing at a time."""

from typing import Any

import torch
from torch import Tensor

from appo.method.selection import perception_slots
from appo.method.token_weights import token_weights
from appo.train.groups import Group
from appo.train.trainer import Trainer
from appo_kernels import group_divergence


class ShuffledWeights(Trainer):
    """APPO's weights, each response's at random places: what is left when only their sizes matter."""

    def weigh(self, group: Group, *operands: Any) -> None:
        super().weigh(group, *operands)
        assert group.weights is not None
        generator = torch.Generator().manual_seed(int(group.completion_ids.sum()))
        for weights, valid in zip(group.weights, group.mask, strict=True):
            places = valid.nonzero().flatten()
            weights[places] = weights[places[torch.randperm(len(places), generator=generator)]]


class EntropyWeights(Trainer):
    """APPO's weights, each response's largest at its most uncertain tokens: no attention, no other response."""

    def weigh(self, group: Group, *operands: Any) -> None:
        super().weigh(group, *operands)
        assert group.weights is not None
        for weights, entropy, valid in zip(group.weights, group.entropy, group.mask, strict=True):
            places = valid.nonzero().flatten()
            weights[places[entropy[places].argsort(stable=True)]] = weights[places].sort().values


class TrueFrames(Trainer):
    """APPO with the frames that decide the question given: what a perfect selection would bring."""

    def weigh(
        self, group: Group, mass: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor
    ) -> None:
        config, mask = self.config, group.mask.to(mass.device)
        frames = torch.tensor(sorted(group.prompt.crucial_frames()), dtype=torch.int64, device=mass.device)
        slots = perception_slots(mass, mask, frames, top_tokens=config.slot_tokens)
        divergence = group_divergence(hidden, weight, lse, slots, kind=config.divergence, bias=bias, **self.logits)
        weights = token_weights(divergence, slots, mask, alpha=config.alpha, average=config.average)
        group.target_frames, group.weights = frames.cpu(), weights.cpu()
        group.mass, group.mass_reduction = mass.cpu(), config.mass_reduction


# DAPO without resampling: every method then trains on the same number of sampled responses.
VARIANTS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "grpo": (Trainer, {"preset": "grpo"}),
    "dapo": (Trainer, {"preset": "dapo", "dynamic_sampling": False}),
    "appo-hard": (Trainer, {"strategy": "hard"}),
    "appo-soft": (Trainer, {"strategy": "soft"}),
    "appo-all": (Trainer, {"strategy": "all"}),
    "appo-contrast": (Trainer, {"strategy": "contrast"}),
    "appo-released": (Trainer, {"preset": "released", "slot_tokens": 8, "rewards": {"accuracy": 1.0}}),
    "control-shuffled": (ShuffledWeights, {"strategy": "all"}),
    "control-entropy": (EntropyWeights, {"strategy": "all"}),
    "control-true-frames": (TrueFrames, {}),
}
