"""Which responses are computed together: each once, in order, within the budgets, groups whole where they fit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from appo.train.micro_batches import micro_batches


def group(prompt: int, lengths: list[int]) -> Any:
    longest = max(lengths)
    return SimpleNamespace(prompt=range(prompt), mask=torch.arange(longest) < torch.tensor(lengths)[:, None])


def cut(groups: list[Any], **options: Any) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Of each micro-batch, which responses of which group."""
    names = {id(group): number for number, group in enumerate(groups)}
    return [[(names[id(part.group)], part.responses) for part in parts] for parts in micro_batches(groups, **options)]


GROUPS = [group(10, [4, 4, 4]), group(20, [5, 0, 9]), group(3, [2, 1])]


def test_groups_only() -> None:
    whole = [(0, (0, 1, 2)), (1, (0, 1, 2)), (2, (0, 1))]
    assert cut(GROUPS, groups_at_most=2, tokens=0, shared=True) == [whole[:2], whole[2:]]
    assert cut([], groups_at_most=2, tokens=0, shared=True) == []


# 22, 34 and 6 tokens: all together; the first alone, the others together; the second cut, whose rest the third joins.
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (62, [[(0, (0, 1, 2)), (1, (0, 1, 2)), (2, (0, 1))]]),
        (40, [[(0, (0, 1, 2))], [(1, (0, 1, 2)), (2, (0, 1))]]),
        (30, [[(0, (0, 1, 2))], [(1, (0, 1))], [(1, (2,))], [(2, (0, 1))]]),
        (35, [[(0, (0, 1, 2))], [(1, (0, 1, 2))], [(2, (0, 1))]]),
        (1, [[(0, (0,))], [(0, (1,))], [(0, (2,))], [(1, (0,))], [(1, (1, 2))], [(2, (0,))], [(2, (1,))]]),
    ],
)
def test_token_budget(tokens: int, expected: list[Any]) -> None:
    assert cut(GROUPS, groups_at_most=8, tokens=tokens, shared=True) == expected


# Tokens: any number, less than a prompt, and around one response, one group and two; prompts shared and repeated.
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 13, 24, 25, 37, 60])
@pytest.mark.parametrize("groups_at_most", [1, 2, 3])
def test_every_response_once_within_the_budgets(groups_at_most: int, tokens: int, shared: bool) -> None:
    found = list(micro_batches(GROUPS, groups_at_most=groups_at_most, tokens=tokens, shared=shared))
    seen = [(id(part.group), response) for parts in found for part in parts for response in part.responses]
    assert seen == [(id(g), response) for g in GROUPS for response in range(len(g.mask))]
    assert sum(part.last for parts in found for part in parts) == len(GROUPS)
    for parts in found:
        assert 1 <= len(parts) <= groups_at_most and all(part.responses for part in parts)
        lengths = [part.take(part.group.mask).sum(1) for part in parts]
        copies = [1 if shared else int((length > 0).sum()) for length in lengths]
        prompts = [len(part.group.prompt) * count for part, count in zip(parts, copies, strict=True)]
        most = sum(prompts) + sum(int(length.sum()) for length in lengths)
        assert sum(int(length.sum()) for length in lengths) > 0
        alone = len(parts) == 1 and int((lengths[0] > 0).sum()) == 1
        assert not tokens or most <= tokens or alone
