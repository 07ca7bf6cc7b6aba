"""Presets: methods as the settings in which they differ from "paper", the defaults.

docs/training.md has PAPER_AND_BASELINES; docs/own_method.md has the formula of each of OTHER_METHODS, its source, and
what of it was verified.
"""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

PAPER_AND_BASELINES: dict[str, dict[str, Any]] = {
    "paper": {},
    # The authors' trainer scales weights to 1 .. 1.7, and alpha is what is added to 1.
    "released": {
        "strategy": "all", "slot_tokens": 128, "divergence": "k3", "alpha": 0.7, "average": "member",
        "rewards": {"accuracy": 0.9, "format": 0.1},
    },
    "grpo": {"method": "grpo", "eps_high": 0.2, "aggregation": "grpo"},
    "dapo": {"method": "grpo", "dynamic_sampling": True, "overlong_buffer": 96},
}  # fmt: skip
OTHER_METHODS: dict[str, dict[str, Any]] = {
    # TW-GRPO, arXiv 2505.24718: k3 between responses at the same position; weights of 1 .. 1.7.
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
PRESETS = PAPER_AND_BASELINES | OTHER_METHODS


def preset_settings(name: str, overrides: Mapping[str, Any], *, longest: int) -> dict[str, Any]:
    """The settings of a preset of ``PRESETS``, changed by ``overrides``. longest: tokens of a response by default."""
    settings = dict(PRESETS[name])
    longest, prompts = overrides.get("max_new_tokens", longest), overrides.get("prompts_per_step", RAL_UPDATES)
    if name == "dapo" and isinstance(longest, Integral):
        settings["overlong_buffer"] = min(settings["overlong_buffer"], int(longest) // 4)
    if name == "ral" and isinstance(prompts, Integral):
        settings["updates_per_step"] = max(2, min(RAL_UPDATES, int(prompts)))
    return settings | dict(overrides)
