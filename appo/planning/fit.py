"""Settings with which a plan fits: `appo plan --fit`."""

from dataclasses import replace
from typing import Any

from appo.planning.plan import Plan


def fit(plan: Plan, memory: float) -> tuple[Plan, list[str]] | None:
    """The plan with the fewest changes that fits in ``memory`` bytes a GPU, and these as options; None if none does.

    In this order: activations once more in the backward, a group behind one prompt, one group at a time, one response
    at a time, fewer tokens sampled at a time (none of which changes what is learned), where the model is in shards
    another engine that samples, then LoRA, then up to 64 times the GPUs.
    """
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--gradient-checkpointing", {"checkpointing": True}),
        ("--share-prompt", {"share_prompt": True}),
        ("--micro-groups 1", {"micro_groups": 1}),
        (f"--micro-tokens {plan.least_tokens}", {"micro_tokens": plan.least_tokens}),
        ("--rollout-tokens 32768", {"rollout_tokens": min(32_768, plan.work.rollout_tokens)}),
    ]
    apart, lora = ("--other-engine", {"own_rollout": False}), ("--lora-rank 64", {"lora_rank": 64})
    ways = [changes[:count] for count in range(len(changes) + 1)]
    gpus = plan.work.gpus
    for factor in (1, 2, 4, 8, 16, 32, 64):
        more = []
        if factor > 1:
            prompts = -(-plan.work.prompts // (gpus * factor)) * gpus * factor
            more = [(f"--gpus {gpus * factor} --prompts {prompts}", {"gpus": gpus * factor, "prompts": prompts})]
        tried = [way + more for way in ways]
        if gpus * factor > 1:
            tried.append([*changes, apart, *more])
        for way in [*tried, [*changes, lora, *more]]:
            new = {name: value for _, values in way for name, value in values.items()}
            found = replace(plan, work=replace(plan.work, **new))
            if found.peak() <= memory:
                used = [option for option, values in way if any(getattr(plan.work, k) != v for k, v in values.items())]
                return found, used
    return None
