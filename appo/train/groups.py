"""What flows through a training step: groups of responses, and batches of groups padded for the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from appo.data.prompts import Prompt, PromptBatch, collate


@dataclass
class Group:
    """The G responses sampled for one prompt, N tokens each (padded on the right), and all that is known about them."""

    prompt: Prompt
    completion_ids: Tensor  # (G, N) int64
    mask: Tensor  # (G, N) bool: the response's tokens, its end token included
    rollout_logprobs: Tensor  # (G, N) fp32, as the engine that sampled them saw them
    finished: Tensor  # (G,) bool: False for a response that was cut off at the length limit
    texts: list[str]
    rewards: Tensor  # (G,) fp32, the weighted sum
    accuracy: Tensor  # (G,) fp32, what divides S1 from S2
    rewards_by_name: dict[str, Tensor]  # (G,) each; NaN where a reward does not apply
    advantages: Tensor  # (G,) fp32

    # Filled in by scoring, which leaves out groups without signal.
    old_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))  # (G, N) fp32
    ref_logprobs: Tensor | None = None  # (G, N) fp32, with beta > 0
    entropy: Tensor = field(default_factory=lambda: torch.empty(0))  # (G, N) fp32
    weights: Tensor | None = None  # (G, N) fp32: W of docs/method.md section 5; None: all ones
    target_frames: Tensor | None = None  # (K,) int64: psi'
    mass: Tensor | None = None  # (G, N, F) fp32
    mass_reduction: str = "mean"

    @property
    def informative(self) -> bool:
        """Whether the rewards differ, so that some advantage is not zero."""
        return bool(self.advantages.abs().max() > 0)

    @property
    def scored(self) -> bool:
        return self.old_logprobs.numel() > 0

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())


@dataclass
class ResponseBatch:
    """Groups side by side: B = groups x G rows of P prompt and N response tokens."""

    prompts: PromptBatch  # one entry per group
    group_size: int  # G
    completion_ids: Tensor  # (B, N) int64
    mask: Tensor  # (B, N) bool


def batch_groups(groups: Sequence[Group], pad_id: int, device: torch.device | str) -> ResponseBatch:
    """Pad prompts on the left and responses on the right."""
    return ResponseBatch(
        prompts=collate([group.prompt for group in groups], pad_id, device),
        group_size=groups[0].mask.shape[0],
        completion_ids=stack_tokens([group.completion_ids for group in groups], pad_id).to(device),
        mask=stack_tokens([group.mask for group in groups], False).to(device),
    )


def stack_tokens(parts: Sequence[Tensor], padding: float) -> Tensor:
    """Per-group (G, N_i) tensors as one (groups x G, max N_i) tensor."""
    rows = pad_sequence([part.T for part in parts], batch_first=True, padding_value=padding)  # (groups, N, G)
    return rows.transpose(1, 2).flatten(0, 1)
