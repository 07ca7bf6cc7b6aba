"""APPO in slime, by the paths of functions:

    --custom-reward-post-process-path appo.integrations.slime.weighted_rewards
    --custom-advantage-function-path  appo.integrations.slime.token_advantages

slime trains in Megatron and samples in SGLang, and neither shows attention, so that weights are made where a group is
whole, at its reward (``--group-rm --custom-rm-path``), by a `GroupScorer` with a transformers copy of the policy. Of
what a sample carries, slime hands no new key on to training; rewards it does, and they may be tensors.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from appo.config import APPOConfig
from appo.integrations.before_training import check_model, check_served
from appo.integrations.recording import logit_arguments, record_responses
from appo.integrations.response_head import add_response_head
from appo.integrations.weights import group_weights
from appo.method.advantages import group_advantages

WEIGHTS = "token_weights"  # in Sample.metadata: one number for each response token


class GroupScorer:
    """Writes the token weights of a group's samples into their ``metadata``.

    Args:
        model: a transformers model, whose attention and head are those that weights are made of: load the policy's
            weights into it as often as they shall follow it.
        appo: as of `appo.integrations.trl.APPOTrainer`.
        temperature: of sampling.
    """

    def __init__(self, model: Any, appo: APPOConfig | None = None, *, temperature: float = 1.0) -> None:
        self.model, self.appo, self.temperature = model.eval(), appo or APPOConfig(), temperature
        check_served(self.appo)
        check_model(self.appo, model)
        add_response_head(model)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Any], accuracy: Sequence[float]) -> None:
        """samples: ``slime.utils.types.Sample`` of one prompt, with ``multimodal_train_inputs``; accuracy: of each."""
        device = next(self.model.parameters()).device
        scored = [self._forward(sample, device) for sample in samples]
        longest = max(len(hidden) for _, hidden, _ in scored)
        frames = max(mass.shape[1] for mass, *_ in scored)
        mass, hidden, targets = (
            torch.stack([torch.nn.functional.pad(x, (*widen, 0, longest - len(x))) for x, widen in parts])
            for parts in (
                [(one, (0, frames - one.shape[1])) for one, *_ in scored],
                [(one, (0, 0)) for _, one, _ in scored],
                [(one, ()) for *_, one in scored],
            )
        )
        masks = [torch.tensor(s.loss_mask or [1] * s.response_length, dtype=torch.bool, device=device) for s in samples]
        head = self.model.get_output_embeddings()
        found = group_weights(
            mass, torch.stack([torch.nn.functional.pad(mask, (0, longest - len(mask))) for mask in masks]),
            torch.tensor(accuracy, dtype=torch.float32, device=device), hidden, head.weight, targets,
            config=self.appo, group_size=len(samples), bias=head.bias, **logit_arguments(self.model, self.temperature),
        )  # fmt: skip
        for sample, row in zip(samples, found.weights, strict=True):
            sample.metadata[WEIGHTS] = row[: sample.response_length].tolist()

    def _forward(self, sample: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of the N response tokens: mass (N, F), hidden states (N, D) that predict them, and ids (N,)."""
        ids, length, config = (
            torch.tensor(sample.tokens, device=device)[None],
            sample.response_length,
            self.model.config,
        )
        media = {name: value.to(device) for name, value in (sample.multimodal_train_inputs or {}).items()}
        prompt = torch.arange(ids.shape[1], device=device) < ids.shape[1] - length
        types = torch.zeros_like(ids)
        for name, kind in (("image_token_id", 1), ("video_token_id", 2)):
            types[prompt[None] & (ids == getattr(config, name, None))] = kind
        recorder = record_responses(self.model, ids, length, self.appo, video_grid_thw=media.get("video_grid_thw"))
        media.setdefault("mm_token_type_ids", types)
        with recorder:
            hidden = self.model(
                input_ids=ids, **media, response_head=lambda rows, *_: rows, response_length=length
            )  # fmt: skip
        return recorder.mass[0], hidden[0], ids[0, -length:]


def weighted_rewards(args: Namespace, samples: Sequence[Any]) -> tuple[list[float], list[Tensor]]:
    """Raw rewards, and for each sample the weighted advantages (response_length,) fp32 of its tokens.

    Advantages are those of slime's GRPO: the reward less the group's mean, over its deviation where
    ``grpo_std_normalization`` is set.

    Raises:
        ValueError: a sample without weights, or with another number of them than response tokens.
    """
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    groups: dict[Any, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group_index, []).append(index)
    advantages = torch.zeros(len(raw))
    for rows in groups.values():
        rewards = torch.tensor([raw[i] for i in rows])
        advantages[rows] = group_advantages(rewards, scale="group" if args.grpo_std_normalization else "none")
    weighted = []
    for index, sample in enumerate(samples):
        weights = (sample.metadata or {}).get(WEIGHTS)
        if weights is None or len(weights) != sample.response_length:
            got = "none" if weights is None else len(weights)
            raise ValueError(
                f"`metadata[{WEIGHTS!r}]`: expected {sample.response_length} weights in sample {sample.index}, got "
                f"{got}. Call a GroupScorer in the function of --custom-rm-path, with --group-rm."
            )
        weighted.append(advantages[index] * torch.tensor(weights, dtype=torch.float32))
    return raw, weighted


def token_advantages(args: Namespace, rollout_data: dict[str, Any]) -> None:
    """Set ``advantages`` and ``returns`` to what `weighted_rewards` has put in the place of rewards.

    Raises:
        ValueError: context parallelism, whose processes hold parts of a response; rewards that are no tensors.
    """
    if getattr(args, "context_parallel_size", 1) > 1:
        raise ValueError("`context_parallel_size`: expected 1 with APPO's token weights. Leave it out.")
    rewards, lengths = rollout_data["rewards"], rollout_data["response_lengths"]
    for index, (row, length) in enumerate(zip(rewards, lengths, strict=True)):
        if not isinstance(row, Tensor) or tuple(row.shape) != (length,):
            got = tuple(row.shape) if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(
                f"`rewards`: expected ({length},) advantages of sample {index}, got {got}. Set "
                "--custom-reward-post-process-path to appo.integrations.slime.weighted_rewards."
            )
    device = rollout_data["kl"][0].device if rollout_data.get("kl") else rollout_data["loss_masks"][0].device
    rollout_data["advantages"] = [row.to(device) for row in rewards]
    rollout_data["returns"] = list(rollout_data["advantages"])
