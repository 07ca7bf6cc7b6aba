"""Sampling a group of responses per prompt.

The trainer needs nothing but the ``Rollout`` protocol: an engine of another kind (a server, another library) fits in
its place. ``TransformersRollout`` samples with the model that is being trained: the prompt, its video included, goes
through the model once, and the cache is repeated for the group.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from appo.data.prompts import Prompt, collate
from appo.models.loaded import cache_argument, end_ids, prompt_positions, vision_token_ids

FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. Raises ValueError for settings that make no sense."""

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


class TransformersRollout:
    """Samples with a transformers model (also one wrapped by peft) on its own device.

    suppress_ids: never sampled; default ``vision_token_ids``.
    """

    def __init__(self, model: Any, processor: Any, *, suppress_ids: Sequence[int] | None = None) -> None:
        self.model = model
        self.version = 0
        tokenizer = getattr(processor, "tokenizer", processor)
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.eos_ids = end_ids(model, tokenizer)
        self.suppress_ids = list(vision_token_ids(model, tokenizer) if suppress_ids is None else suppress_ids)

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Nothing to take over: it is the model in training that samples."""
        self.version = version

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[list[Completion]]:
        """See ``Rollout``. Vision tower and prompt run once per prompt; stops when every response has ended.

        The model's training mode is set aside while sampling.
        """
        device = next(self.model.parameters()).device
        inputs = collate(prompts, self.pad_id, device).inputs
        # One number in [0, 1) for each token to come, drawn by prompt and response: what is sampled does not depend on
        # the rest of the batch, and nothing is drawn or uploaded per token.
        shape = (sampling.group_size, sampling.max_new_tokens)
        draws = torch.cat([torch.from_numpy(np.random.default_rng(seed).random(shape)) for seed in seeds]).to(device)
        with _evaluating(self.model):
            ids, valid, logprobs, running = self._sample(inputs, sampling, draws)
        lengths = valid.sum(1).tolist()
        flat = [
            Completion(row[:length], scores[:length], "length" if cut else "stop", self.version)
            for row, scores, length, cut in zip(ids.cpu(), logprobs.cpu(), lengths, running.tolist(), strict=True)
        ]
        return [flat[start : start + sampling.group_size] for start in range(0, len(flat), sampling.group_size)]

    def _sample(self, inputs: Mapping[str, Tensor], sampling: Sampling, draws: Tensor) -> tuple[Tensor, ...]:
        """ids, valid and logprobs (B, n), and running (B,), of B = prompts x G responses padded to n tokens."""
        size, prompt_mask = sampling.group_size, inputs["attention_mask"]
        positions = prompt_positions(self.model, inputs)  # (3, P, L) or (P, L)
        cache = DynamicCache(config=self.model.config.get_text_config())
        caching = {cache_argument(self.model): cache, "use_cache": True}
        output = self.model(**inputs, position_ids=positions, logits_to_keep=1, **caching)
        # By index: layers of linear attention have no repetition of their own.
        order: Any = torch.arange(len(prompt_mask), device=prompt_mask.device).repeat_interleave(size)
        cache.reorder_cache(order)
        logits = output.logits[:, -1].repeat_interleave(size, 0)  # (B, V)
        position = positions[..., -1:].repeat_interleave(size, -2)
        rows, length = logits.shape[0], prompt_mask.shape[1]
        mask = torch.ones(rows, length + sampling.max_new_tokens, dtype=prompt_mask.dtype, device=prompt_mask.device)
        mask[:, :length] = prompt_mask.repeat_interleave(size, 0)

        ends = torch.tensor(self.eos_ids, device=logits.device)
        suppressed = torch.tensor(self.suppress_ids, dtype=torch.int64, device=logits.device)
        running = torch.ones(rows, dtype=torch.bool, device=logits.device)
        ids, valid, logprobs = [], [], []
        for step in range(sampling.max_new_tokens):
            token, logprob = self.pick(logits, sampling, draws[:, step], suppressed)
            ids.append(torch.where(running, token, self.pad_id))
            logprobs.append(logprob.masked_fill(~running, 0.0))
            valid.append(running)
            running = running & ~torch.isin(token, ends)
            if step + 1 == sampling.max_new_tokens or not bool(running.any()):
                break
            # Text goes on one position after the prompt's last, in a full forward as well as here.
            position = position + 1
            output = self.model(
                input_ids=ids[-1][:, None],
                attention_mask=mask[:, : length + step + 1],
                position_ids=position,
                **caching,
            )
            logits = output.logits[:, -1]
        return torch.stack(ids, 1), torch.stack(valid, 1), torch.stack(logprobs, 1), running

    def pick(self, logits: Tensor, sampling: Sampling, draws: Tensor, suppressed: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) sampled ids and (B,) fp32 log-probabilities from (B, V) logits and a number in [0, 1) for each row."""
        scores = (logits.float() / (sampling.temperature or 1.0)).log_softmax(-1)
        allowed = scores.index_fill(-1, suppressed, -torch.inf)
        if sampling.temperature == 0:
            token = allowed.argmax(-1)
        else:
            token = draw_token(_nucleus(allowed.softmax(-1), sampling.top_p), draws)
        return token, scores.gather(-1, token[:, None])[:, 0]


def draw_token(probabilities: Tensor, draws: Tensor) -> Tensor:
    """(B,) int64: the token at which the running sum of (B, V) probabilities passes the share ``draws`` (B,) of all.

    A token of probability 0 is never drawn. Sums are fp64: a vocabulary's tail would be lost in fp32.
    """
    sums = probabilities.double().cumsum(-1)
    total = sums[:, -1:]
    # Strictly below the total, which rounding of the product may reach.
    wanted = torch.minimum(draws[:, None].double() * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, wanted, right=True)[:, 0]


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The most probable tokens that reach ``top_p`` together keep their probability, all others get 0."""
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    # In training mode gradient checkpointing switches the cache off, and dropout is on.
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


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
