"""From sampled responses to a group with rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from appo.config import APPOConfig
from appo.data.prompts import Prompt
from appo.rollout.engine import Completion
from appo.rollout.rewards import combine, overlong_penalty
from appo.train.groups import Group, pad_completions


def texts_of(completions: Sequence[Completion], tokenizer: Any) -> list[str]:
    """The responses as text, without special tokens."""
    return [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]


def grade(
    prompt: Prompt,
    completions: Sequence[Completion],
    tokenizer: Any,
    reward_weights: Mapping[str, float],
    config: APPOConfig,
) -> Group:
    """The responses to one prompt with their rewards (docs/data.md)."""
    ids, mask, logprobs = pad_completions(completions, tokenizer.pad_token_id)
    texts, records = texts_of(completions, tokenizer), [prompt.record] * len(completions)
    rewards = combine(reward_weights, texts, records, lenient=config.rewards_lenient)
    accuracy = rewards.by_name.get("accuracy")
    if accuracy is None:
        accuracy = combine({"accuracy": 1.0}, texts, records, lenient=config.rewards_lenient).total
    total = rewards.total
    if config.overlong_buffer:
        total = total + overlong_penalty(mask.sum(1), max_length=config.max_new_tokens, buffer=config.overlong_buffer)
    return Group(
        prompt=prompt,
        completion_ids=ids,
        mask=mask,
        rollout_logprobs=logprobs,
        finished=torch.tensor([completion.finish_reason == "stop" for completion in completions]),
        texts=texts,
        rewards=total,
        accuracy=accuracy,
        rewards_by_name=rewards.by_name,
        unreadable=rewards.unreadable,
        weight_version=min(completion.weight_version for completion in completions),
    )
