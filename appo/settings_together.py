"""Settings beside each other: rewards that are known, and what excludes what. Errors name the setting to change."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from appo.constraints import ConfigError, shown, suggestion

# Names that `rewards` may use; `appo.rollout.rewards.register` adds to them.
REWARD_NAMES = {
    "accuracy", "format", "math", "multiple_choice", "ocr", "regression", "rouge", "temporal_iou", "think_length",
}  # fmt: skip
# How tokens are weighed; `appo.train.rules` has the rules.
METHODS = ("appo", "grpo", "tw-grpo", "vppo", "pgpo")
# Name, and the setting that it may not exceed.
LIMITS = (
    ("overlong_buffer", "max_new_tokens"),
    ("updates_per_step", "prompts_per_step"),  # each update takes whole groups
    ("min_groups", "prompts_per_step"),  # otherwise no update is ever made
    ("warmup_steps", "max_steps"),
)


def check_together(config: Any) -> None:
    """Raise ConfigError for the first settings of an `APPOConfig` that cannot stand beside each other."""
    _check_rewards(config.rewards)
    _check_name("method", config.method, METHODS)
    for name, limit in LIMITS:
        if getattr(config, name) > getattr(config, limit):
            raise ConfigError(
                f"`{name}`: expected at most {limit} = {getattr(config, limit)}, got {getattr(config, name)}. "
                "Change either."
            )
    for check in (_engine, _checkpointing, _shards, _correction, _method, _loss):
        if (reason := check(config)) is not None:
            raise ConfigError(reason)


def _check_rewards(rewards: dict[str, float]) -> None:
    for name in rewards:
        _check_name("rewards", name, REWARD_NAMES, "one that was registered before, ")
    if not any(rewards.values()):
        raise ConfigError("`rewards`: expected a weight other than 0, got 0 for all. Nothing would be learned.")


def _check_name(setting: str, name: str, known: Collection[str], others: str = "") -> None:
    """Raise ConfigError unless ``name`` is one of ``known``, or a function of a file that exists."""
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py") and function.isidentifier():
        if not Path(file).is_file():
            raise ConfigError(f"`{setting}`: {shown(file)}: no such file. Paths start from the working directory.")
    elif name not in known:
        expected = f"one of {', '.join(sorted(known))}, {others}or FILE.py:NAME"
        unnamed = name.removesuffix(":").endswith(".py")
        end = " The function's name is missing." if unnamed else suggestion(name, known)
        raise ConfigError(f"`{setting}`: expected {expected}, got {shown(name)}.{end}")


# Each returns a reason why settings cannot stand beside each other, or None.


def _engine(config: Any) -> str | None:
    if config.engine == "vllm-server" and bool(config.engine_urls) == bool(config.vllm_python):
        return (
            "`engine`: vllm-server needs either `engine_urls` of servers that run or `vllm_python`, the interpreter of "
            f"an environment with vLLM; got {'both' if config.engine_urls else 'neither'}. See docs/engines.md."
        )
    if config.asynchronous and config.engine == "vllm":
        return (
            "`asynchronous`: expected false with engine = vllm, which shares the device and sleeps while the trainer "
            "computes, got true. Set `engine` to vllm-server."
        )
    try:
        arguments = json.loads(config.vllm_arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return f"`vllm_arguments`: expected a JSON object, got {shown(config.vllm_arguments)}."
    return None


def _checkpointing(config: Any) -> str | None:
    for name, off in (("checkpoint_every", 1), ("checkpoint_offload", False)):
        if not config.gradient_checkpointing and getattr(config, name) != off:
            return (
                f"`{name}`: expected {shown(off)} without gradient_checkpointing, got {shown(getattr(config, name))}. "
                "Set `gradient_checkpointing: true`, or leave it out."
            )
    return None


def _shards(config: Any) -> str | None:
    if config.shard == "fsdp" and config.dtype == "float16":
        return (
            "`dtype`: expected bfloat16 or float32 with shard = fsdp, got float16, whose loss scaling shards do not "
            "agree on. Change either."
        )
    if config.shard == "fsdp" and config.optimizer != "adamw":
        return (
            f"`optimizer`: expected adamw with shard = fsdp, got {config.optimizer}, which does not take shards. "
            "Set `offload: true` to keep its state in the host's memory."
        )
    for name in ("shard_group", "offload"):
        if getattr(config, name) and config.shard == "none":
            return f"`{name}`: needs shards, got shard = none. Set `shard: fsdp`, or leave `{name}` out."
    return None


def _correction(config: Any) -> str | None:
    if config.rollout_floor and config.rollout_correction not in ("clip", "mask"):
        return (
            f"`rollout_floor`: expected 0 with rollout_correction = {config.rollout_correction}, which has a cap only, "
            f"got {config.rollout_floor:g}. Set `rollout_correction` to clip or mask."
        )
    if config.rollout_floor > config.rollout_cap:
        return (
            f"`rollout_floor`: expected at most rollout_cap = {config.rollout_cap:g}, got {config.rollout_floor:g}. "
            "Change either."
        )
    return None


def _method(config: Any) -> str | None:
    sums = "its shares of attention are sums over the keys of a frame"
    if config.mass_reduction != "sum":
        if config.method in ("vppo", "pgpo"):
            return f"`mass_reduction`: expected sum with method = {config.method}, got mean: {sums}."
        if config.attention_coef > 0:
            return f"`mass_reduction`: expected sum with attention_coef > 0, got mean: {sums}."
    if config.attention_coef > 0 and config.updates_per_step < 2:
        return (
            "`updates_per_step`: expected at least 2 with attention_coef > 0, got 1: in the first update on a batch "
            "attention is as it was scored, and the divergence from it has no gradient."
        )
    if config.disagreement == "mixture" and config.divergence != "kl":
        return f"`divergence`: expected kl with disagreement = mixture, which is made of it, got {config.divergence}."
    if config.disagreement != "divergence" and config.method != "appo":
        return f"`disagreement`: expected divergence with method = {config.method}, got {config.disagreement}."
    if config.normalise and config.method in ("grpo", "vppo"):
        return f"`normalise`: expected null with method = {config.method}, whose weights it does not reach, got mean."
    return None


def _loss(config: Any) -> str | None:
    if config.delta is not None and config.delta <= 1 + config.eps_high:
        return (
            f"`delta`: expected more than 1 + eps_high = {1 + config.eps_high:g}, which caps the ratio already, got "
            f"{config.delta:g}. Change either, or leave `delta` out."
        )
    if config.kind == "dppo_tv" and config.level != "token":
        return "`level`: expected token with kind = dppo_tv, which limits each token's probability, got sequence."
    if config.kl_ratio and config.beta == 0:
        return "`beta`: expected more than 0 with kl_ratio, which multiplies the KL term, got 0."
    if config.kind in ("cispo", "sapo", "gpg") and config.delta is not None:
        return f"`delta`: expected null with kind = {config.kind}, which has no two-sided clip, got {config.delta:g}."
    return None
