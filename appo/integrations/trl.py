"""APPO in TRL's GRPO trainer: videos, token weights and the fused surrogate.

    trainer = APPOTrainer(model, reward_funcs=[accuracy], args=GRPOConfig(...), train_dataset=data, appo=APPOConfig())

TRL (1.16) samples from a prompt's videos and then scores and trains without them; here they go along. Everything else
is TRL's: dataset, sampling, rewards, advantages, metrics, checkpoints, and the losses that are not fused here.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from appo.config import APPOConfig
from appo.integrations.before_training import accuracy_column, check_layout, check_model, check_served
from appo.integrations.media import Media, WithMedia, forward_inputs, split_media
from appo.integrations.recording import logit_arguments, record_responses
from appo.integrations.response_head import add_response_head
from appo.integrations.trl_loss import fused_loss, log_mean, loss_mask, why_not_fused
from appo.integrations.weights import GroupWeights, group_weights
from appo.models.loaded import unwrapped, vision_token_ids
from appo.models.positions import use_positions

logger = logging.getLogger("appo")


class APPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` that trains on videos with APPO's token weights.

    Args:
        appo: ``method`` and the settings of its weights are read (docs/own_method.md); the loss has those of ``args``.
            "grpo": W = 1, and nothing is recorded.
        accuracy: name of the reward function that says which responses are right; None: the first.
        others: those of ``GRPOTrainer``.

    The weights are folded into (B, T) advantages, so that every ``loss_type`` of TRL takes them; those of
    ``appo.integrations.trl_loss.FUSED`` are computed by ``linear_weighted_surrogate`` where no option forbids it.

    Raises:
        ValueError: settings that are no token weights, attention that cannot be recorded, groups that straddle
            processes, ZeRO-3, an unknown reward, prompts with videos for vLLM (which TRL does not hand them to).
    """

    def __init__(self, *args: Any, appo: APPOConfig | None = None, accuracy: str | None = None, **others: Any) -> None:
        self.appo = appo or APPOConfig()
        check_served(self.appo)
        super().__init__(*args, **others)
        self._accuracy_column = accuracy_column(self.reward_func_names, accuracy)
        check_layout(self)
        base = unwrapped(self.model)
        check_model(self.appo, base)
        for each in filter(None, (base, getattr(self, "ref_model", None))):
            use_positions(each, self.appo.video_positions)
        add_response_head(base)
        self._logits = logit_arguments(base, self.temperature)
        self._not_fused = why_not_fused(self, base.config.get_text_config())
        logger.info("APPOTrainer: %s", f"TRL's loss, for {self._not_fused}" if self._not_fused else "fused loss")
        if getattr(base.config, "video_token_id", None) is not None:
            # A sampled video token would be taken for one of the prompt's video.
            self.generation_config.suppress_tokens = vision_token_ids(base, self._tokenizer)
        self._media: list[Media] | None = None  # of the rows at hand
        self._accuracy: Tensor | None = None  # (B,) of this process's rows

    # sampling: keep what TRL drops

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        self._media = None
        if "pixel_values_videos" in fields:
            if self.use_vllm:
                raise ValueError(
                    "`use_vllm`: expected prompts without videos, which TRL does not hand to vLLM. Set it to False."
                )
            self._media = split_media(prompts, fields, self.accelerator.device)
            images = None  # TRL would process them again, without the videos beside them
        return prompt_ids, images, fields

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        start = self.accelerator.process_index * len(prompts)  # rewards are of all processes
        own = rewards[start : start + len(prompts), self._accuracy_column]
        self._accuracy = own.nan_to_num(nan=0.0)
        return rewards

    # scoring: weights while groups are whole

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._media = None
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._media is not None:
            output["media"] = self._media
        if self.model.training and self.appo.weighs(self._media is not None):
            found = self._score(output)
            output["token_weights"], output["scored_logprobs"] = found.weights, found.logprobs
            output["response_advantages"] = output["advantages"]
            output["advantages"] = output["advantages"][:, None] * found.weights
            mask = loss_mask(output)
            log_mean(self, "appo/weight_mean", found.weights[mask].mean(), mask.sum())
            counts = torch.tensor([float(len(frames)) for frames in found.frames], device=mask.device)
            log_mean(self, "appo/target_frames", counts.mean(), counts.new_tensor(len(counts)))
        return output

    @torch.no_grad()
    def _score(self, output: dict[str, Any]) -> GroupWeights:
        """Weights of this process's groups: a forward of each, its mass recorded, no logits made."""
        rows, size = len(output["prompt_ids"]), self.num_generations
        parts = [self._score_group(output, slice(start, start + size)) for start in range(0, rows, size)]
        weights, logprobs, frames = zip(*parts, strict=True)
        return GroupWeights(torch.cat(weights), torch.cat(logprobs), [one for part in frames for one in part])

    def _score_group(self, output: dict[str, Any], own: slice) -> GroupWeights:
        assert self._accuracy is not None
        rewards, targets, mask = self._accuracy[own], output["completion_ids"][own], loss_mask(output)[own]
        ids = torch.cat([output["prompt_ids"][own], targets], 1)
        length = targets.shape[1]
        inputs = forward_inputs(self._media[own], ids, length) if self._media else {}
        recorder = record_responses(self.model, ids, length, self.appo, video_grid_thw=inputs.get("video_grid_thw"))

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GroupWeights:
            return group_weights(
                recorder.mass, mask, rewards, hidden, weight, targets, config=self.appo, group_size=len(ids),
                bias=bias, **self._logits,
            )  # fmt: skip

        inputs["attention_mask"] = torch.cat([output["prompt_mask"][own], output["completion_mask"][own]], 1)
        with self.accelerator.autocast(), recorder:
            found: GroupWeights = self.model(input_ids=ids, **inputs, response_head=head, response_length=length)
        return found

    # loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self._media is not None:
            model = WithMedia(model, self._media, logits_to_keep)
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._media = inputs.get("media")
        if self._not_fused or not self.model.training:
            return super()._compute_loss(model, inputs)
        return fused_loss(self, model, inputs, self._logits)
