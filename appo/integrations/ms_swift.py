"""APPO in ms-swift's GRPO trainer, by an external plugin:

    # plugin.py
    from appo.config import APPOConfig
    from appo.integrations import ms_swift

    ms_swift.use(APPOConfig(strategy="soft"), accuracy="accuracy")

    swift rlhf --rlhf_type grpo --external_plugins plugin.py ...

The weights are multiplied into the (B, T) advantages that all of ms-swift's losses take, but for Liger's.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.rlhf_trainers.utils import collate_to_grpo_micro_batch, get_even_process_data
from swift.trainers.trainer_factory import TrainerFactory
from torch import Tensor

from appo.config import APPOConfig
from appo.integrations.before_training import accuracy_column, check_layout, check_model, check_served
from appo.integrations.recording import logit_arguments, record_responses
from appo.integrations.weights import GroupWeights, group_weights
from appo.models.loaded import unwrapped


def use(appo: APPOConfig | None = None, *, accuracy: str | None = None) -> None:
    """Train with ``APPOTrainer`` wherever ms-swift would with its GRPO trainer.

    Args:
        appo: as of `appo.integrations.trl.APPOTrainer`.
        accuracy: name of the reward function that says which responses are right; None: the first.
    """
    APPOTrainer.appo, APPOTrainer.accuracy = appo or APPOConfig(), accuracy
    check_served(APPOTrainer.appo)
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{APPOTrainer.__module__}.{APPOTrainer.__name__}"


class APPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` with token weights, made in one more forward of each group without gradient.

    Raises:
        ValueError: Liger's loss, which takes the mean of a response's advantages, and the weights with it; padding-free
            rows, sequence parallelism and ZeRO-3; groups that straddle processes; an unknown reward.
    """

    appo, accuracy = APPOConfig(), cast(str | None, None)  # set by ``use``

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings, template = kwargs["args"], kwargs["template"]
        refused = {
            "use_liger_kernel": (settings.use_liger_kernel, "its loss averages the advantages of a response's tokens"),
            "padding_free": (template.padding_free, "its rows hold no group as a batch"),
            "sequence_parallel_size": (template.sequence_parallel_size > 1, "no process holds a whole sequence"),
        }
        for name, (asked, reason) in refused.items():
            if asked:
                raise ValueError(f"`{name}`: expected it off with APPO's token weights: {reason}. Turn it off.")
        super().__init__(*args, **kwargs)
        check_model(self.appo, self.model)
        check_layout(self)
        self._accuracy_column = accuracy_column(self.reward_func_names, self.accuracy)

    def _prepare_batch_inputs(self, samples: Any) -> Any:
        collate = self.template.data_collator  # takes out of what a sample has encoded what it collates
        self.template.data_collator = lambda batch, **options: collate([dict(one) for one in batch], **options)
        try:
            return super()._prepare_batch_inputs(samples)
        finally:
            del self.template.data_collator

    def _postprocess_batch(self, samples: Any, batch_encoded_inputs: Any) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        if not self.model.training or self.appo.method == "grpo":
            return
        rewards = get_even_process_data(self, self._rewards_per_func[:, self._accuracy_column]).nan_to_num(nan=0.0)
        weights: list[Tensor] = []  # of each sample: those of its trained tokens, in order
        for start in range(0, len(samples), self.num_generations):
            own = slice(start, start + self.num_generations)
            weights += self._weigh(samples[own], rewards[own])
        self._metrics["train"]["appo/weight_mean"].append(torch.cat(weights).mean().item())
        left = iter(weights)
        for encoded in batch_encoded_inputs:
            batch = encoded["grpo_batch"]
            for row, mask in zip(batch.advantages, batch.completion_mask.bool(), strict=True):
                row[mask] *= next(left).to(row)

    def _weigh(self, group: Sequence[Any], rewards: Tensor) -> list[Tensor]:
        if len(group) != self.num_generations or len({sample.prompt_id for sample in group}) != 1:
            raise ValueError(
                "`per_device_train_batch_size`: expected whole groups in each process: choose it so that times "
                f"steps_per_generation it is a multiple of num_generations = {self.num_generations}."
            )
        with self._template_context(self.template):
            inputs, batch = collate_to_grpo_micro_batch(
                group, self.template, device=self.accelerator.device, use_logits_to_keep=True
            )
        inputs.pop("labels", None)
        mask = batch.completion_mask.bool()
        found = self._score(inputs, mask, rewards.to(mask.device))
        return [row[own] for row, own in zip(found.weights, mask, strict=True)]

    @torch.no_grad()
    def _score(self, inputs: dict[str, Any], mask: Tensor, rewards: Tensor) -> GroupWeights:
        base = unwrapped(self.model)
        ids, length = inputs["input_ids"], mask.shape[1]
        recorder = record_responses(base, ids, length, self.appo, video_grid_thw=inputs.get("video_grid_thw"))
        rows: list[Tensor] = []
        found: list[GroupWeights] = []

        # ms-swift's hook on the model drops arguments that it does not know, so that it is watched from within.
        def keep(decoder: Any, arguments: Any, output: Any) -> None:
            rows.append(output[0][:, -length - 1 : -1])

        def weigh(head: Any, arguments: Any, output: Any) -> None:  # within its forward the weight is whole
            weight, hidden = head.weight, rows[0].to(head.weight.dtype)
            found.append(
                group_weights(
                    recorder.mass, mask, rewards, hidden, weight, ids[:, -length:], config=self.appo, bias=head.bias,
                    group_size=len(ids), **logit_arguments(base, self.temperature),
                )
            )  # fmt: skip

        hooks = [
            base.get_decoder().register_forward_hook(keep),
            base.get_output_embeddings().register_forward_hook(weigh),
        ]
        arguments = {**inputs, "use_cache": False}
        if "logits_to_keep" in self.model_kwarg_keys:
            arguments["logits_to_keep"] = 1  # of the head's own output nothing is used
        try:
            with self.accelerator.autocast(), recorder:
                self.model(**arguments)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0]
