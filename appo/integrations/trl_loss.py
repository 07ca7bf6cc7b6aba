"""TRL's clipped losses out of hidden states: what `appo.integrations.trl` computes in place of ``_compute_loss``."""

from typing import Any

import torch
from torch import Tensor

from appo.integrations.media import forward_inputs
from appo_kernels import SurrogateOutput, linear_weighted_surrogate, token_logprobs
from appo_kernels.ops.weighted_surrogate.kinds import SAPO_TAU_GAIN, SAPO_TAU_LOSS

# TRL's loss type -> kind and aggregation of the surrogate.
FUSED = {
    "dapo": ("clip", "dapo"), "grpo": ("clip", "grpo"), "bnpo": ("clip", "bnpo"), "dr_grpo": ("clip", "dr_grpo"),
    "luspo": ("clip", "dr_grpo"), "cispo": ("cispo", "dapo"), "sapo": ("sapo", "grpo"),
}  # fmt: skip
# Fields of configs that scale logits, which the fused loss does not.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def why_not_fused(trainer: Any, text_config: Any) -> str:
    """Options of the trainer that the fused loss does not have, separated by commas; "" when it has all."""
    asked = {
        f"loss_type {trainer.loss_type!r}": trainer.loss_type not in FUSED,
        "vLLM's importance sampling": trainer.use_vllm and trainer.vllm_importance_sampling_correction,
        "top_entropy_quantile": trainer.top_entropy_quantile < 1,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "the entropy bonus": trainer._entropy_bonus_enabled,
        "an epsilon_high below 1": trainer.loss_type == "cispo" and trainer.epsilon_high < 1,
        "SAPO's temperatures": trainer.loss_type == "sapo" and _temperatures(trainer) != (SAPO_TAU_GAIN, SAPO_TAU_LOSS),
        "the auxiliary loss": trainer.aux_loss_enabled,
        "cast_lm_head_to_fp32": trainer.args.cast_lm_head_to_fp32,
        "scaled logits": any(getattr(text_config, name, None) not in (None, 1.0) for name in SCALES),
    }
    return ", ".join(name for name, wanted in asked.items() if wanted)


def _temperatures(trainer: Any) -> tuple[float, float]:
    return trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """(B, N) bool: response tokens that are trained on, without what tools wrote."""
    mask: Tensor = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()


def fused_loss(trainer: Any, model: Any, inputs: dict[str, Any], logits: dict[str, Any]) -> Tensor:
    """The loss of TRL's ``loss_type`` in training, for one micro-batch; its metrics are logged under TRL's names."""
    targets, mask = inputs["completion_ids"], loss_mask(inputs)
    ids = torch.cat([inputs["prompt_ids"], targets], 1)
    steps = trainer.current_gradient_accumulation_steps
    # Sampled by the weights that are trained: the ratio is 1, and old are those found while scoring.
    old = inputs.get("old_per_token_logps", inputs.get("scored_logprobs"))
    # num_items_in_batch counts a whole generation batch over all processes, whose gradients are averaged.
    items = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    weighted = "token_weights" in inputs
    kind, aggregation = FUSED[trainer.loss_type]
    longest = 1 if trainer.loss_type == "luspo" else trainer.max_completion_length  # LUSPO sums a response's tokens

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> SurrogateOutput:
        before = old
        if before is None:
            with torch.no_grad():
                found = token_logprobs(hidden[mask], weight, targets[mask], bias=bias, **logits).logprobs
            before = torch.zeros_like(mask, dtype=found.dtype).masked_scatter(mask, found)
        return linear_weighted_surrogate(
            hidden, weight, targets, before,
            inputs["response_advantages"] if weighted else inputs["advantages"], mask,
            token_weights=inputs["token_weights"] if weighted else None,
            kind=kind, eps_low=trainer.epsilon_low, delta=trainer.args.delta if kind == "clip" else None,
            eps_high=trainer.epsilon_high - (kind == "cispo"),  # TRL's is the limit itself
            kl_ratio=trainer.args.use_bias_correction_kl and trainer.beta != 0,
            ref_logprobs=inputs["ref_per_token_logps"] if trainer.beta != 0 else None, beta=trainer.beta,
            level=trainer.importance_sampling_level, aggregation=aggregation,
            num_items=items * steps / trainer.args.steps_per_generation, max_length=longest,
            bias=bias, **logits,
        )  # fmt: skip

    media = forward_inputs(inputs["media"], ids, targets.shape[1]) if "media" in inputs else {}
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with trainer.accelerator.autocast():
        loss, metrics = model(
            input_ids=ids, attention_mask=attention, **media, response_head=head, response_length=targets.shape[1]
        )
    low, high = metrics["clip_low"], metrics["clip_high"]
    names = {
        "clip": {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high},
        "cispo": {"cispo_clip_ratio": high},
    }
    for name, value in names.get(kind, {}).items():
        log_mean(trainer, name, value, mask.sum())
    log_mean(trainer, "entropy", metrics["entropy"], mask.sum())
    if trainer.beta != 0:
        log_mean(trainer, "kl", metrics["ref_kl"], mask.sum())
    # "dapo" divides by tokens of the whole window; the others are means, of which a window has ``steps``.
    return loss if aggregation == "dapo" else loss / steps


def log_mean(trainer: Any, name: str, value: Tensor, count: Tensor) -> None:
    """A mean over ``count`` things, as TRL logs it: of all processes."""
    total = trainer.accelerator.reduce(torch.stack([value.detach().float() * count, count.float()]), reduction="sum")
    mode = "train" if trainer.model.training else "eval"
    trainer._metrics[mode][name].append((total[0] / total[1].clamp(min=1)).item())
