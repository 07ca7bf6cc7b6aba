"""Methods as settings: the presets of other papers, and the settings that cannot stand beside each other.

docs/own_method.md has the formula of each, its source, and what of it was verified.
"""

from collections.abc import Mapping
from typing import Any

# Name of a preset -> the settings in which it differs from "paper".
PRESETS: dict[str, dict[str, Any]] = {
    # TW-GRPO, arXiv 2505.24718: k3 between responses at the same position; its 1.7 is the largest weight.
    "tw-grpo": {"method": "tw-grpo", "divergence": "k3", "average": "member", "alpha": 0.7},
    # "80/20", arXiv 2506.01939: on DAPO's loss, the tokens of highest entropy alone.
    "top-entropy": {"method": "grpo", "entropy_share": 0.2},
    # VPPO, arXiv 2510.09285, its dependence on the image replaced by frame mass.
    "vppo": {"method": "vppo", "mass_reduction": "sum", "token_share": 0.4, "factor_floor": 0.9},
    # PGPO, arXiv 2604.01840, in form: threshold gate, and weights that add no credit.
    "pgpo": {"method": "pgpo", "mass_reduction": "sum", "token_share": 0.4, "alpha": 1.7, "normalise": "mean"},
    # RAL, arXiv 2602.04884, on frames and the rest: the last layer, and updates after the first.
    "ral": {"method": "grpo", "attention_coef": 1.0, "mass_reduction": "sum", "layers": 1},
}
RAL_UPDATES = 4  # on one batch of rollouts, where there are as many prompts


def preset_settings(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset of ``PRESETS``, changed by ``overrides``."""
    settings = dict(PRESETS[name])
    prompts = overrides.get("prompts_per_step", RAL_UPDATES)
    if name == "ral" and isinstance(prompts, int):
        settings["updates_per_step"] = max(2, min(RAL_UPDATES, prompts))
    return settings | dict(overrides)


def check_method(config: Any) -> str | None:
    """Why settings of the method and the loss cannot stand beside each other; None where they can."""
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
    if config.normalise and config.method in ("grpo", "vppo"):
        return f"`normalise`: expected null with method = {config.method}, whose weights it does not reach, got mean."
    if config.kind == "dppo_tv" and config.level != "token":
        return "`level`: expected token with kind = dppo_tv, which limits each token's probability, got sequence."
    if config.kl_ratio and config.beta == 0:
        return "`beta`: expected more than 0 with kl_ratio, which multiplies the KL term, got 0."
    if config.kind in ("cispo", "sapo", "gpg") and config.delta is not None:
        return f"`delta`: expected null with kind = {config.kind}, which has no two-sided clip, got {config.delta:g}."
    return None
