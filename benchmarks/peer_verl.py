"""Settings of verl's policy losses for `benchmarks.peer_losses`: its ``ppo_loss``, on batches as its engine has."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer_cases import Batch, Case, weighted_advantages

EPS_LOW, EPS_HIGH, CAP, KL_COEF = 0.2, 0.28, 1.3, 0.04
# verl's policy_loss.loss_mode -> our kind, and the clip_ratio_low and clip_ratio_c that it is compared at. verl's cispo
# has a floor of 1 - clip_ratio_low and ours none; clip_ratio_c is ``delta`` where a kind has one.
LOSS_MODES = {
    "vanilla": ("clip", EPS_LOW, 1.5), "dppo_tv": ("dppo_tv", 0.005, 1.2), "gspo": ("gspo_token", EPS_LOW, 3.0),
    "sapo": ("sapo", EPS_LOW, 3.0), "gpg": ("gpg", EPS_LOW, 3.0), "cispo": ("cispo", 1.0, 3.0),
}  # fmt: skip
HIGH = {"dppo_tv": 0.01}
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
# verl's rollout_is and rollout_is_threshold -> our settings.
CORRECTIONS: dict[str, dict[str, Any]] = {
    f"token {CAP}": {"rollout_correction": "truncate"},
    f"sequence {CAP}": {"rollout_correction": "truncate", "rollout_level": "sequence"},
    f"token 0.8_{CAP}": {"rollout_correction": "mask", "rollout_floor": 0.8},
}
HORIZON = 16  # loss_scale_factor


def cases() -> Iterator[Case]:
    """Every loss that is a kind of ours, each aggregation, alone and with KL, entropy and correction, W = 1 and not."""
    options: list[dict[str, Any]] = [
        {}, {"kl": True}, {"entropy_coef": 0.1}, *({"correction": name} for name in CORRECTIONS),
        {"kl": True, "entropy_coef": 0.1, "correction": f"token {CAP}"},
    ]  # fmt: skip
    for mode, aggregation in itertools.product(LOSS_MODES, AGGREGATIONS):
        if mode == "sapo" and aggregation != "seq-mean-token-mean":  # it takes no other
            continue
        for weighted, option in itertools.product((False, True), options):
            chosen = {"aggregation": aggregation, "weighted": weighted, "entropy_coef": 0.0}
            chosen |= option
            yield Case(
                mode, partial(verl_loss, mode, chosen), partial(our_options, mode, chosen),
                partial(scale, chosen),
                slack=1e-7 if mode == "sapo" else 0.0,  # its tau of 1.05 is in the dtype of A, ours and TRL's in fp32
            )  # fmt: skip


def global_batch(batch: Batch) -> dict[str, Any]:
    """Of two processes, in unequal parts."""
    tokens, responses = int(batch["mask"].sum()), len(batch["mask"])
    return {"dp_size": 2, "batch_num_tokens": 2 * tokens + 5, "global_batch_size": 2 * responses + 2}


def scale(option: dict[str, Any], batch: Batch) -> float:
    """verl multiplies by the processes, whose gradients are averaged; means of responses are of the global batch."""
    whole = global_batch(batch)
    if option["aggregation"] == "token-mean":
        return 1.0  # in num_items
    if option["aggregation"] == "token-sum":
        return float(whole["dp_size"])
    return len(batch["mask"]) * whole["dp_size"] / whole["global_batch_size"]


def verl_loss(mode: str, option: dict[str, Any], batch: Batch, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """verl's loss of (B, T) log-probabilities and entropies, each behind a prompt of two tokens."""
    from tensordict import TensorDict
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    lengths = batch["lengths"].tolist()

    def rows(values: Tensor) -> Tensor:
        parts = [row[:n] for row, n in zip(values, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    def sequences(values: Tensor) -> Tensor:
        """As the engine returns them: a value for every token of a sequence, of the token that follows it."""
        parts = [torch.nn.functional.pad(row[:n], (1, 1)) for row, n in zip(values, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    prompts = torch.zeros(len(lengths), 2, dtype=torch.long)
    advantages = weighted_advantages(batch, option["weighted"])
    columns = {
        "responses": rows(batch["targets"]), "response_mask": rows(batch["mask"]), "old_log_probs": rows(batch["old"]),
        "advantages": rows(advantages.view(len(lengths), -1).expand_as(batch["mask"])),
        "ref_log_prob": rows(batch["ref"]),
        "prompts": torch.nested.as_nested_tensor(list(prompts), layout=torch.jagged),
    }  # fmt: skip
    if "correction" in option:
        level, threshold = option["correction"].split()
        found, _, _ = compute_rollout_correction_and_rejection_mask(
            batch["old"], known_rollout(batch), batch["mask"], rollout_is=level, rollout_is_threshold=threshold
        )
        columns["rollout_is_weights"] = rows(found.batch["rollout_is_weights"])
    data = TensorDict(columns, batch_size=[len(lengths)])
    tu.assign_non_tensor(data, max_response_len=batch["mask"].shape[1], **global_batch(batch))
    _, low, cap = LOSS_MODES[mode]
    config = ActorConfig(
        strategy="fsdp", rollout_n=2, use_dynamic_bsz=True, ppo_mini_batch_size=8, clip_ratio_low=low, clip_ratio=0.2,
        clip_ratio_high=HIGH.get(mode, EPS_HIGH), clip_ratio_c=cap, loss_agg_mode=option["aggregation"],
        loss_scale_factor=HORIZON, policy_loss=PolicyLossConfig(loss_mode=mode), entropy_coeff=option["entropy_coef"],
        use_kl_loss=option.get("kl", False), kl_loss_coef=KL_COEF,
    )  # fmt: skip
    loss, _ = ppo_loss(config, {"log_probs": sequences(logprobs), "entropy": sequences(entropy)}, data)
    return loss


def known_rollout(batch: Batch) -> Tensor:
    """verl has no rule for a NaN; ours, a ratio of 1, is TRL's."""
    return torch.where(batch["rollout"].isnan(), batch["old"], batch["rollout"])


def our_options(mode: str, option: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """The same settings in our words."""
    kind, low, cap = LOSS_MODES[mode]
    whole, kl = global_batch(batch), option.get("kl", False)
    aggregations: dict[str, dict[str, Any]] = {
        "token-mean": {"aggregation": "dapo", "num_items": whole["batch_num_tokens"] / whole["dp_size"]},
        "token-sum": {"aggregation": "dapo", "num_items": 1},
        "seq-mean-token-sum": {"aggregation": "dr_grpo", "max_length": 1},
        "seq-mean-token-sum-norm": {"aggregation": "dr_grpo", "max_length": HORIZON},
        "seq-mean-token-mean": {"aggregation": "grpo"},
    }
    arguments = {
        "kind": kind, "eps_low": low, "eps_high": HIGH.get(mode, EPS_HIGH),
        "delta": cap if kind in ("clip", "dppo_tv") else None,
        "token_weights": batch["token_weights"] if option["weighted"] else None,
        "beta": KL_COEF if kl else 0.0, "ref_logprobs": batch["ref"] if kl else None,
        "advantages": batch["advantages"], "mask": batch["mask"], "entropy_coef": option["entropy_coef"],
    }  # fmt: skip
    if "correction" in option:
        arguments |= {"rollout_logprobs": known_rollout(batch), "rollout_cap": CAP} | CORRECTIONS[option["correction"]]
    return arguments | aggregations[option["aggregation"]]
