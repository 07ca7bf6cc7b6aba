"""Sampling a group of responses per prompt.

The trainer needs nothing but the ``Rollout`` protocol: an engine of another kind (a server, another library)
fits in its place. ``TransformersRollout`` samples with the model that is being trained: the prompt, its video
included, goes through the model once, and the cache is repeated for the group.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from appo.models.loaded import cache_argument, end_ids, prompt_positions, vision_token_ids


@dataclass(frozen=True)
class Completions:
    """Responses of P prompts in groups of G: those of prompt p are the rows p * G to p * G + G - 1.

    ids: (P*G, N) int64, padded on the right with the pad id. mask: (P*G, N) bool, True on a response's
    tokens, its end token included. logprobs: (P*G, N) fp32, natural log, of each token under the full softmax
    at the sampling temperature, before suppression and top-p, which is what scoring computes (at temperature
    1 for greedy decoding); 0 where mask is False. finished: (P*G,) bool, False for a response that was cut
    off at the length limit.
    """

    ids: Tensor
    mask: Tensor
    logprobs: Tensor
    finished: Tensor


class Rollout(Protocol):
    """Something that samples ``group_size`` responses to each prompt."""

    def generate(self, inputs: Mapping[str, Tensor], generator: torch.Generator) -> Completions:
        """inputs: what the processor made of P prompts, padded on the left. generator: decides the samples."""
        ...


class TransformersRollout:
    """Samples with a transformers model (also one wrapped by peft) on its own device.

    max_new_tokens: N at most. temperature: 0 is greedy. top_p: smallest set of tokens with at least this
    probability. suppress_ids: never sampled; default ``vision_token_ids``, since a sampled video token breaks
    the forward that scores it. Raises ValueError for sampling settings that make no sense, and for prompts
    padded on the right.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        suppress_ids: Sequence[int] | None = None,
    ) -> None:
        _check_settings(group_size, max_new_tokens, temperature, top_p)
        self.model = model
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        tokenizer = getattr(processor, "tokenizer", processor)
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.eos_ids = end_ids(model, tokenizer)
        self.suppress_ids = list(vision_token_ids(model, tokenizer) if suppress_ids is None else suppress_ids)

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, Tensor], generator: torch.Generator) -> Completions:
        """See ``Rollout``. Vision tower and prompt run once per prompt; stops when every response has ended.

        generator: on the model's device. The model's training mode is set aside while sampling.
        """
        prompt_mask = inputs["attention_mask"]
        if not bool(prompt_mask[:, -1].all()):
            raise ValueError(
                "generate: `inputs`: expected prompts padded on the left, got an attention_mask that ends in 0. "
                "Set the tokenizer's padding_side to 'left'."
            )
        with _evaluating(self.model):
            return self._sample(dict(inputs), prompt_mask, generator)

    def _sample(self, inputs: dict[str, Any], prompt_mask: Tensor, generator: torch.Generator) -> Completions:
        positions = prompt_positions(self.model, inputs)  # (3, P, L) or (P, L)
        cache = DynamicCache(config=self.model.config.get_text_config())
        caching = {cache_argument(self.model): cache, "use_cache": True}
        output = self.model(**inputs, position_ids=positions, logits_to_keep=1, **caching)
        cache.batch_repeat_interleave(self.group_size)
        logits = output.logits[:, -1].repeat_interleave(self.group_size, 0)  # (B, V) with B = P * G
        position = positions[..., -1:].repeat_interleave(self.group_size, -2)
        rows, total = logits.shape[0], prompt_mask.shape[1] + self.max_new_tokens
        mask = torch.ones(rows, total, dtype=prompt_mask.dtype, device=logits.device)
        mask[:, : prompt_mask.shape[1]] = prompt_mask.repeat_interleave(self.group_size, 0)

        ends = torch.tensor(self.eos_ids, device=logits.device)
        running = torch.ones(rows, dtype=torch.bool, device=logits.device)
        ids, valid, logprobs = [], [], []
        for step in range(self.max_new_tokens):
            token, logprob = self._pick(logits, generator)
            ids.append(torch.where(running, token, self.pad_id))
            logprobs.append(logprob.masked_fill(~running, 0.0))
            valid.append(running)
            running = running & ~torch.isin(token, ends)
            if step + 1 == self.max_new_tokens or not bool(running.any()):
                break
            # Text goes on one position after the prompt's last, in a full forward as well as here.
            position = position + 1
            output = self.model(
                input_ids=ids[-1][:, None],
                attention_mask=mask[:, : prompt_mask.shape[1] + step + 1],
                position_ids=position,
                **caching,
            )
            logits = output.logits[:, -1]
        return Completions(torch.stack(ids, 1), torch.stack(valid, 1), torch.stack(logprobs, 1), ~running)

    def _pick(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B,) sampled ids and (B,) fp32 log-probabilities from (B, V) logits."""
        scores = (logits.float() / (self.temperature or 1.0)).log_softmax(-1)
        allowed = scores.index_fill(
            -1, torch.tensor(self.suppress_ids, dtype=torch.int64, device=scores.device), -torch.inf
        )
        if self.temperature == 0:
            token = allowed.argmax(-1)
        else:
            probabilities = _nucleus(allowed.softmax(-1), self.top_p)
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return token, scores.gather(-1, token[:, None])[:, 0]


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The most probable tokens that reach ``top_p`` together keep their probability, all others get 0."""
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)


@contextmanager
def _evaluating(model: Any) -> Any:
    # In training mode gradient checkpointing switches the cache off, and dropout is on.
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_settings(group_size: int, max_new_tokens: int, temperature: float, top_p: float) -> None:
    for name, value in (("group_size", group_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"TransformersRollout: `{name}`: expected at least 1, got {value}. 8 and 384 are usual.")
    if temperature < 0:
        raise ValueError(
            f"TransformersRollout: `temperature`: expected 0 (greedy) or more, got {temperature}. 1 is usual."
        )
    if not 0 < top_p <= 1:
        raise ValueError(
            f"TransformersRollout: `top_p`: expected more than 0 and at most 1, got {top_p}. 1 keeps every token."
        )
