"""Settings of TRL's GRPO losses for `benchmarks.peer_losses`: its ``_compute_loss``, on a stand-in for its trainer."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from appo.method.token_filters import off_policy_sequences, top_entropy_tokens
from appo_kernels.ops.weighted_surrogate.loss import importance
from benchmarks.peer_cases import Batch, Case, weighted_advantages

EPS_LOW, EPS_HIGH, MAX_LENGTH = 0.2, 0.28, 16
ACCUMULATION, STEPS_PER_GENERATION, PROCESSES = 2, 4, 2
# TRL's loss type -> our kind, aggregation and length. Its cispo clamps at epsilon_high itself, ours at 1 + eps_high.
LOSS_TYPES = {
    "dapo": ("clip", "dapo", MAX_LENGTH), "grpo": ("clip", "grpo", MAX_LENGTH), "bnpo": ("clip", "bnpo", MAX_LENGTH),
    "dr_grpo": ("clip", "dr_grpo", MAX_LENGTH), "luspo": ("clip", "dr_grpo", 1),
    "cispo": ("cispo", "dapo", MAX_LENGTH), "sapo": ("sapo", "grpo", MAX_LENGTH),
}  # fmt: skip
# TRL's vllm_importance_sampling_mode, with and without a lower bound -> our settings.
CORRECTIONS: dict[str, dict[str, Any]] = {
    "token_truncate": {"rollout_correction": "truncate"},
    "token_truncate from 0.8": {"rollout_correction": "clip", "rollout_floor": 0.8},
    "token_mask": {"rollout_correction": "mask", "rollout_floor": 0.8},
    "sequence_truncate": {"rollout_correction": "truncate", "rollout_level": "sequence"},
    "sequence_mask": {"rollout_correction": "mask", "rollout_floor": 0.5, "rollout_level": "sequence"},
}
CAP = 1.3
# Each option of TRL's loss alone, and those that can stand together.
OPTIONS: list[dict[str, Any]] = [
    {}, {"delta": 1.5}, {"beta": 0.04}, {"beta": 0.04, "kl_ratio": True}, {"off_policy": 0.2}, {"top_entropy": 0.4},
    *({"correction": name} for name in CORRECTIONS),
    {"delta": 1.5, "beta": 0.04, "kl_ratio": True, "off_policy": 0.2, "top_entropy": 0.4, "correction": "token_mask"},
]  # fmt: skip


def cases() -> Iterator[Case]:
    """Every loss type at both levels with each option, W = 1 and weighted; the entropy bonus where ours is the same."""
    for loss_type, (kind, aggregation, _) in LOSS_TYPES.items():
        for level in ("token", "sequence"):
            for weighted in (False, True):
                for option in OPTIONS:
                    if "delta" in option and kind != "clip":  # TRL's is of the clipped losses
                        continue
                    # TRL's entropy bonus is the mean over the tokens of a micro-batch, whatever the loss.
                    for entropy_coef in (0.0, 0.1) if aggregation == "bnpo" and "top_entropy" not in option else (0.0,):
                        chosen = {"level": level, "weighted": weighted, "entropy_coef": entropy_coef} | option
                        yield Case(
                            loss_type, partial(trl_loss, loss_type, chosen), partial(our_options, loss_type, chosen),
                            # "dapo" divides by the tokens of a whole window, the others are means of a step's part.
                            scale=lambda batch, of=aggregation: 1.0 if of == "dapo" else 1 / ACCUMULATION,
                        )  # fmt: skip


def num_items(batch: Batch) -> Tensor:
    """num_items_in_batch: of a generation batch, over all processes."""
    return 7 * batch["mask"].sum()


def rollout_ratio(batch: Batch, correction: str) -> Tensor:
    """(B, T): importance_sampling_ratio, which TRL makes while scoring (tests/integrations compares that)."""
    mine = {"rollout_level": "token", "rollout_floor": 0.0} | CORRECTIONS[correction]
    valid = batch["mask"] != 0
    return importance(
        batch["old"].where(valid, 0), batch["rollout"].where(valid, 0), valid, correction=mine["rollout_correction"],
        level=mine["rollout_level"], floor=mine["rollout_floor"], cap=CAP,
    )  # fmt: skip


def trl_loss(loss_type: str, option: dict[str, Any], batch: Batch, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """TRL's loss of (B, T) log-probabilities and entropies, in a micro-batch of a window of ``ACCUMULATION``."""
    from trl import GRPOTrainer

    accelerator = SimpleNamespace(
        num_processes=PROCESSES, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x,
        gather_for_metrics=lambda x: x, pad_across_processes=lambda x, **_: x,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        args=SimpleNamespace(
            delta=option.get("delta"), use_bias_correction_kl=option.get("kl_ratio", False),
            steps_per_generation=STEPS_PER_GENERATION, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        ),
        model=SimpleNamespace(training=True), accelerator=accelerator, _metrics={"train": defaultdict(list)},
        current_gradient_accumulation_steps=ACCUMULATION, loss_type=loss_type, beta=option.get("beta", 0.0),
        importance_sampling_level=option["level"], epsilon_low=EPS_LOW,
        epsilon_high=1 + EPS_HIGH if loss_type == "cispo" else EPS_HIGH,
        max_completion_length=MAX_LENGTH, top_entropy_quantile=option.get("top_entropy", 1.0),
        off_policy_mask_threshold=option.get("off_policy"), get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        use_vllm="correction" in option, vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=option["entropy_coef"] != 0, entropy_coef=option["entropy_coef"],
        use_adaptive_entropy=False, aux_loss_enabled=False,
    )  # fmt: skip
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    empty = batch["targets"][:, :0]
    inputs = {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": batch["targets"], "completion_mask": batch["mask"],
        "advantages": weighted_advantages(batch, option["weighted"]), "old_per_token_logps": batch["old"],
        "ref_per_token_logps": batch["ref"], "sampling_per_token_logps": batch["rollout"],
        "num_items_in_batch": num_items(batch),
    }  # fmt: skip
    if "correction" in option:
        inputs["importance_sampling_ratio"] = rollout_ratio(batch, option["correction"])
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def our_options(loss_type: str, option: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """The same settings in our words; ``num_items`` is TRL's normaliser, per process and accumulation step."""
    kind, aggregation, max_length = LOSS_TYPES[loss_type]
    mask, weights = batch["mask"].bool(), torch.ones_like(batch["token_weights"])
    if option["weighted"]:
        weights = batch["token_weights"]
    if "off_policy" in option:
        weights = weights * off_policy_sequences(
            batch["logprobs"], batch["rollout"], batch["advantages"], mask, threshold=option["off_policy"]
        )
    if "top_entropy" in option:
        weights = weights * top_entropy_tokens(batch["entropy"], mask, share=option["top_entropy"])
    corrected = "correction" in option
    return {
        "kind": kind, "kl_ratio": option.get("kl_ratio", False), "token_weights": weights,
        "eps_low": EPS_LOW, "eps_high": EPS_HIGH, "delta": option.get("delta"), "beta": option.get("beta", 0.0),
        "ref_logprobs": batch["ref"] if "beta" in option else None,
        "rollout_logprobs": batch["rollout"] if corrected else None, "rollout_cap": CAP,
        "level": option["level"], "aggregation": aggregation, "max_length": max_length,
        "num_items": num_items(batch) / PROCESSES * ACCUMULATION / STEPS_PER_GENERATION,
        "advantages": batch["advantages"], "mask": batch["mask"], "entropy_coef": option["entropy_coef"],
    } | (CORRECTIONS[option["correction"]] if corrected else {})  # fmt: skip
