"""Engines that sample a group of responses per prompt: what the trainer hands over, and what it gets back.

The trainer needs nothing but the ``Rollout`` protocol: an engine of any kind (a server, another library) fits in.
`appo.rollout.model_engine` samples with the model that is being trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from appo.data.prompts import Prompt

FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Raises ValueError for settings that make no sense."""

    group_size: int  # G responses per prompt
    max_new_tokens: int  # of one response
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # the smallest set of tokens with at least this probability; 1: all

    def __post_init__(self) -> None:
        for name in ("group_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"Sampling: `{name}`: expected at least 1, got {getattr(self, name)}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"Sampling: `temperature`: expected 0 (greedy) or a number above, got {self.temperature}. 1 is usual."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: `top_p`: expected 0 < top_p <= 1, got {self.top_p}. 1 keeps every token.")


@dataclass(frozen=True)
class Completion:
    """One response of n tokens, without padding, on the CPU."""

    ids: Tensor  # (n,) int64, its end token included
    # (n,) fp32, natural log, of each token under the full softmax at the sampling temperature, before suppression and
    # top-p, which is what scoring computes (at temperature 1 for greedy decoding); NaN where the engine does not know.
    logprobs: Tensor
    finish_reason: str  # "stop": with an end token; "length": cut off at the limit
    weight_version: int = 0  # that of the last ``update_weights`` before it was sampled


def seed_of(*parts: int) -> int:
    """One seed from several numbers, such as that of the run and the place of a record."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Rollout(Protocol):
    """An engine that samples responses, in this process or another.

    With several processes each calls ``generate`` for prompts of its own, how often and with how many may differ, and
    all call ``update_weights`` together.
    """

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
    ) -> Sequence[Sequence[Completion]]:
        """``sampling.group_size`` responses to each prompt, in order.

        A prompt brings everything an engine may want: the rendered chat as text, token ids, decoded frames with their
        times (``clips``, ``images``), and the tensors of the processor. seeds: one per prompt; the responses to it
        depend on it and on the weights, not on the prompts beside it. Tokens that stand for pixels
        (`appo.models.loaded.vision_token_ids`) must not be sampled: they would break the forward that scores them.
        """
        ...

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Take over the weights of the model in training (sharded if it is), before the first rollout and after every
        step that changed them. Responses carry the version."""
        ...


def checked(
    found: Sequence[Sequence[Completion]], engine: Rollout, prompts: Sequence[Prompt], sampling: Sampling
) -> Sequence[Sequence[Completion]]:
    """``found``, when it is what was asked of ``engine``. Raises ValueError naming the engine's class."""
    name = type(engine).__name__
    if [len(group) for group in found] != [sampling.group_size] * len(prompts):
        raise ValueError(
            f"{name}.generate: expected {sampling.group_size} completions for each of {len(prompts)} prompts, got "
            f"{[len(group) for group in found]}."
        )
    for completion in (completion for group in found for completion in group):
        ids, logprobs = completion.ids, completion.logprobs
        if ids.dtype != torch.int64 or ids.dim() != 1 or len(ids) > sampling.max_new_tokens:
            raise ValueError(
                f"{name}.generate: `ids`: expected at most {sampling.max_new_tokens} int64 token ids, got {ids.dtype} "
                f"of shape {tuple(ids.shape)}."
            )
        if logprobs.shape != ids.shape or logprobs.dtype != torch.float32:
            raise ValueError(
                f"{name}.generate: `logprobs`: expected one fp32 number for each of {len(ids)} tokens, got "
                f"{logprobs.dtype} of shape {tuple(logprobs.shape)}."
            )
        if completion.finish_reason not in FINISH_REASONS:
            raise ValueError(
                f"{name}.generate: `finish_reason`: expected one of {', '.join(FINISH_REASONS)}, got "
                f"{completion.finish_reason!r}. A request that was aborted or failed is to be repeated, or an error."
            )
    return found
