"""Wrong arguments of group_divergence and group_divergence_from_logits are named."""

from typing import Any

import pytest
import torch

from appo_kernels import group_divergence, group_divergence_from_logits

INF = float("inf")


GROUP_BAD: list[tuple[str, dict[str, Any]]] = [
    ("lse", {"lse": torch.zeros(3, 6)}),
    ("lse", {"lse": torch.zeros(3, 5, dtype=torch.bfloat16)}),
    ("lse", {"lse": torch.full((3, 5), float("nan"))}),
    ("lse", {"lse": torch.full((3, 5), -INF)}),
    ("slots", {"slots": torch.zeros(2, 4, 6, dtype=torch.int64)}),
    ("slots", {"slots": torch.zeros(3, 6, dtype=torch.int64)}),
    ("slots", {"slots": torch.zeros(2, 3, 6)}),
    ("slots", {"slots": torch.full((2, 3, 6), 5)}),
    ("slots", {"slots": torch.full((2, 3, 6), -2)}),
    ("slots", {"slots": torch.zeros(2, 3, 6, dtype=torch.int64, device="meta")}),
    ("kind", {"kind": "js"}),
    ("temperature", {"temperature": -1.0}),
    ("backend", {"backend": "numpy"}),
]
HIDDEN_BAD: list[tuple[str, dict[str, Any]]] = [
    ("hidden", {"hidden": torch.zeros(15, 4)}),
    ("hidden", {"hidden": torch.zeros(3, 5, 4, dtype=torch.int32)}),
    ("weight", {"weight": torch.zeros(11, 5)}),
    ("weight", {"weight": torch.zeros(11, 4, dtype=torch.float16)}),
    ("bias", {"bias": torch.zeros(12)}),
    ("softcap", {"softcap": 0.0}),
]


# Wrong shapes, dtypes and values, by argument.
@pytest.mark.parametrize("argument, change", GROUP_BAD + HIDDEN_BAD)
def test_wrong_arguments_are_named(argument: str, change: dict[str, Any]) -> None:
    shared: dict[str, Any] = {"lse": torch.zeros(3, 5), "slots": torch.zeros(2, 3, 6, dtype=torch.int64)}
    hidden: dict[str, Any] = {"hidden": torch.zeros(3, 5, 4), "weight": torch.zeros(11, 4)}
    pattern = rf"`{argument}`: expected .*, got .*\. "
    named = pattern if argument == "backend" else f"group_divergence: {pattern}"
    with pytest.raises(ValueError, match=named):
        group_divergence(**{**hidden, **shared, **change})
    if not change.keys() & hidden.keys() and argument not in ("bias", "softcap"):
        named = pattern if argument == "backend" else f"group_divergence_from_logits: {pattern}"
        with pytest.raises(ValueError, match=named):
            group_divergence_from_logits(**{"logits": torch.zeros(3, 5, 11), **shared, **change})


def test_wrong_logits_are_named() -> None:
    for logits in (torch.zeros(15, 11), torch.zeros(3, 5, 11, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"group_divergence_from_logits: `logits`: expected .*, got "):
            group_divergence_from_logits(logits, torch.zeros(3, 5), torch.zeros(2, 3, 6, dtype=torch.int64))
