"""Variants that `benchmarks.learning` compares: GRPO, DAPO, APPO with each way of choosing frames, and controls that
take away one thing at a time."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from appo.config import APPOConfig
from appo.credit.evidence import find_evidence
from appo.credit.weightings import PEAK_TOGETHER, TOGETHER, shuffled_within_responses, sorted_by_entropy
from appo.presets import OTHER_METHODS
from appo.rollout.user_code import user_function
from appo.tasks.thoughts import telling_spans
from appo.tasks.tiny import build_tokenizer
from appo.train.groups import Group
from appo.train.rules import Divergence, weigh_tokens


def shuffled_weights(group: Group, divergence: Divergence, config: APPOConfig) -> Tensor:
    """APPO's weights, each response's at random places: what is left when only their sizes matter."""
    return shuffled_within_responses(weigh_tokens(group, divergence, config), group)


def entropy_weights(group: Group, divergence: Divergence, config: APPOConfig) -> Tensor:
    """APPO's weights, each response's largest at its most uncertain tokens: no attention, no other response."""
    return sorted_by_entropy(weigh_tokens(group, divergence, config), group)


def true_frames(group: Group, config: APPOConfig) -> Tensor:
    """The frames that decide the question, given: what a perfect selection would bring."""
    return torch.tensor(group.prompt.labelled_frames(), dtype=torch.int64)


# Name -> functions given to the trainer, and settings.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {"preset": "grpo"}),
    # Without resampling: every method then trains on the same number of sampled responses.
    "dapo": ({}, {"preset": "dapo", "dynamic_sampling": False}),
    "appo-hard": ({}, {"strategy": "hard"}),
    "appo-soft": ({}, {"strategy": "soft"}),
    "appo-all": ({}, {"strategy": "all"}),
    "appo-contrast": ({}, {"strategy": "contrast"}),
    "appo-released": ({}, {"preset": "released", "slot_tokens": 8, "rewards": {"accuracy": 1.0}}),
    "control-shuffled": ({"weigh_tokens": shuffled_weights}, {"strategy": "all"}),
    "control-entropy": ({"weigh_tokens": entropy_weights}, {"strategy": "all"}),
    "control-true-frames": ({"choose_frames": true_frames}, {}),
}
tokenizer = cache(build_tokenizer)


def oracle_weights(group: Group, divergence: Divergence, config: APPOConfig) -> Tensor:
    """1 + alpha on the evidence tokens, by their places in the tiny model's text; 1 elsewhere."""
    return 1 + config.alpha * find_evidence(group, tokenizer(), telling_spans).tokens.float()


# Run when they are named (--variants). "w1": W = 1 with APPO's loss, what weights alone are to be compared with
# (--base w1); ours and the oracle of docs/credit.md; other methods' presets (docs/own_method.md).
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "w1": ({}, {"method": "grpo"}),
    "oracle": ({"weigh_tokens": oracle_weights}, {"strategy": "all"}),
    "together": ({}, TOGETHER),
    "peak-together": ({}, PEAK_TOGETHER),
    **{name: ({}, {"preset": name}) for name in OTHER_METHODS},
}


def find_variant(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Functions and settings of a variant by its name, or of a rule FILE.py:NAME (docs/own_method.md).

    Raises ValueError for other names, and for what is wrong with the file.
    """
    known = VARIANTS | OTHERS
    if name in known:
        return known[name]
    if ".py:" not in name:
        raise ValueError(f"`--variants`: expected FILE.py:NAME or one of {', '.join(known)}, got {name!r}.")
    user_function(name, "method")
    return {}, {"method": name}
