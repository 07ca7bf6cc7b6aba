"""Settings, models and layouts that would fail later, or silently: refused before anything is sampled."""

from collections.abc import Sequence
from typing import Any

from appo.config import APPOConfig
from appo.models.loaded import check_head, unwrapped
from appo.recording.hooks import check_attention, last_layers
from appo_kernels import checks

# Settings of a method that are more than token weights, and where they are off.
NOT_WEIGHTS = {"attention_coef": 0.0, "entropy_share": 1.0, "off_policy_threshold": None}


def check_served(config: APPOConfig) -> None:
    """Raise ValueError for a method that is more than token weights, which is all that other trainers are given."""
    for name, off in NOT_WEIGHTS.items():
        if getattr(config, name) != off:
            remedy = "Train with appo's own trainer, or set the option of yours that does it (docs/losses.md)."
            checks.fail("group_weights", "config", f"{name} = {off}", getattr(config, name), remedy)


def check_model(config: APPOConfig, model: Any) -> None:
    """Raise ValueError for attention that cannot be recorded as ``config`` asks, and for adapters on the head."""
    check_head(model)
    if config.records_mass:
        check_attention(unwrapped(model), last_layers(unwrapped(model), config.layers))


def check_layout(trainer: Any) -> None:
    """Raise ValueError where a group's rows would lie in several processes of a trainer of TRL's kind, or the head in
    none of them whole."""
    rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    if rows % trainer.num_generations:
        raise ValueError(
            f"`args`: expected per_device_train_batch_size * steps_per_generation = {rows} to be a multiple of "
            f"num_generations = {trainer.num_generations}, so that no group straddles processes. Change one of them."
        )
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "`args`: expected DDP, FSDP2 or DeepSpeed up to stage 2, got ZeRO-3, which splits the head. Choose another."
        )


def accuracy_column(names: Sequence[str], accuracy: str | None) -> int:
    """The place among a trainer's rewards of the one that says which responses are right; None: the first.

    Raises ValueError for a name that is none of them.
    """
    if accuracy is not None and accuracy not in names:
        raise ValueError(f"`accuracy`: expected one of {', '.join(names)}, got {accuracy!r}.")
    return 0 if accuracy is None else names.index(accuracy)
