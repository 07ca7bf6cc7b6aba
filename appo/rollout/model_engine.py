"""Sampling with the model that is being trained: the prompt, its video included, goes through it once for the group.

A model with the attention implementation "appo" keeps each prompt's keys once (`appo.models.prompt_cache`); others have
them repeated for every response.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from appo.data.prompt_batch import PromptBatch, collate
from appo.data.prompts import Prompt
from appo.models.growing_cache import growing_cache
from appo.models.layouts import layout_of
from appo.models.loaded import (
    cache_argument,
    end_ids,
    prompt_positions,
    refuse_dense_mask,
    unwrapped,
    vision_token_ids,
)
from appo.models.packed_attention import attention_dtype, packed_mask, shares_prompts
from appo.models.prompt_cache import PromptCache
from appo.rollout.engine import Completion, Sampling

CHECK_EVERY = 16  # tokens between two looks at which responses have ended, on a GPU
# Share of rows still running at which the others leave the cache: the copy costs about two tokens' worth of reading.
LEAVE_BELOW = 7 / 8


class TransformersRollout:
    """Samples with a transformers model (also one wrapped by peft) on its own device.

    batch_tokens: tokens of prompts and responses in the cache at a time; more prompts are sampled one batch after
    another, and a group that is too large by itself in parts. suppress_ids: never sampled; default
    ``vision_token_ids``.
    """

    def __init__(
        self, model: Any, processor: Any, *, batch_tokens: int = 262_144, suppress_ids: Sequence[int] | None = None
    ) -> None:
        self.model, self.batch_tokens, self.version = model, batch_tokens, 0
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

        The model's training mode is set aside while sampling. Raises RuntimeError when logits are not finite,
        ValueError for padding beyond 65,536 tokens on CUDA, where attention needs a mask.
        """
        # One number in [0, 1) for each token to come, drawn by prompt and response: what is sampled does not depend on
        # the rest of the batch, and nothing is drawn or uploaded per token.
        shape = (sampling.group_size, sampling.max_new_tokens)
        draws = [torch.from_numpy(np.random.default_rng(seed).random(shape)) for seed in seeds]
        found: list[list[Completion]] = [[] for _ in prompts]
        with _evaluating(self.model):
            shared = shares_prompts(unwrapped(self.model))
            for batch in batches([len(prompt) for prompt in prompts], sampling, self.batch_tokens, shared=shared):
                rows = [row for index, responses in batch for row in draws[index][responses]]
                counts = [len(range(sampling.group_size)[responses]) for _, responses in batch]
                sampled = self._sample([prompts[index] for index, _ in batch], counts, sampling, torch.stack(rows))
                for index, responses in batch:
                    found[index] += itertools.islice(sampled, len(range(sampling.group_size)[responses]))
        return found

    def _sample(
        self, prompts: Sequence[Prompt], counts: Sequence[int], sampling: Sampling, draws: Tensor
    ) -> Iterator[Completion]:
        """``counts`` responses to each prompt, one after another. draws: (B, max_new_tokens), B their number."""
        device, limit = next(self.model.parameters()).device, sampling.max_new_tokens
        batch = collate(prompts, self.pad_id, device)
        inputs = batch.inputs
        shared = shares_prompts(unwrapped(self.model))
        whole = functional.pad(inputs["attention_mask"], (0, 0 if shared else limit), value=1)
        refuse_dense_mask(self.model, whole, remedy="Sample one prompt at a time, or with flash attention.")
        positions = self._positions(prompts).to(device)  # (3, P, L) or (P, L)
        cache: Any = growing_cache(self.model.config, inputs["input_ids"].shape[1] + limit)
        caching = {cache_argument(self.model): cache, "use_cache": True}
        output = self.model(**self._reading(batch), position_ids=positions, logits_to_keep=1, **caching)
        owner: Any = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts)).to(device)  # (B,)
        prompt_cache = None
        if shared:
            dtype = attention_dtype(cache.layers[0].values)
            prompt_cache = PromptCache.of_prefill(cache, [len(prompt) for prompt in prompts], counts, dtype)
            cache = growing_cache(self.model.config, limit)
            caching = caching | {cache_argument(self.model): cache}
        else:
            cache.reorder_cache(owner)  # by index: layers of linear attention have no repetition of their own
        logits, position, draws = output.logits[owner, -1], positions[..., owner, -1:], draws.to(device)
        mask = inputs["attention_mask"][:, : 0 if shared else None]  # a shared prompt needs none
        length = mask.shape[1]
        mask = torch.cat([mask[owner], mask.new_ones(len(owner), limit)], 1)

        ends = torch.tensor(self.eos_ids, device=device)
        suppressed = torch.tensor(self.suppress_ids, dtype=torch.int64, device=device)
        ids = torch.full((len(owner), limit), self.pad_id, device=device)
        logprobs = torch.zeros(ids.shape, device=device)
        lengths, finished = (
            torch.zeros(len(ids), dtype=torch.int64, device=device),
            torch.zeros_like(owner, dtype=torch.bool),
        )
        rows, running = torch.arange(len(ids), device=device), torch.ones_like(finished)  # of those still in the cache
        for step in range(limit):
            token, logprob = self.pick(logits, sampling, draws[:, step], suppressed)
            token = torch.where(running, token, self.pad_id)
            ids[rows, step], logprobs[rows, step] = token, logprob.masked_fill(~running, 0.0)
            lengths[rows] += running
            ended = running & torch.isin(token, ends)
            finished[rows] |= ended
            running = running & ~ended
            if step + 1 == limit:
                break
            # Asking whether all have ended waits for the device: on a GPU not after every token.
            if device.type == "cpu" or step % CHECK_EVERY == CHECK_EVERY - 1:
                left = int(running.sum())
                if left == 0:
                    break
                if left <= LEAVE_BELOW * len(rows):  # the finished ones leave
                    stay: Any = running.nonzero()[:, 0]
                    if cache.get_seq_length():
                        cache.reorder_cache(stay)
                    if prompt_cache is not None:
                        prompt_cache.keep(stay.tolist())
                    rows, running, token, draws, mask = (x[stay] for x in (rows, running, token, draws, mask))
                    position = position[..., stay, :]
            # Text goes on one position after the prompt's last, in a full forward as well as here.
            position = position + 1
            if prompt_cache is not None:
                seen = {"attention_mask": packed_mask(device), "prompt_cache": prompt_cache}
            else:
                seen = {"attention_mask": mask[:, : length + step + 1]}
            output = self.model(input_ids=token[:, None], position_ids=position, **seen, **caching)
            logits = output.logits[:, -1]
        if not bool(logprobs.isfinite().all()):
            raise RuntimeError("TransformersRollout: the model's logits are not finite. Look at its weights and dtype.")
        ends_of = zip(ids.cpu(), logprobs.cpu(), lengths.tolist(), finished.tolist(), strict=True)
        return (
            Completion(row[:count].clone(), scores[:count].clone(), "stop" if ended else "length", self.version)
            for row, scores, count, ended in ends_of
        )

    def _reading(self, batch: PromptBatch) -> dict[str, Any]:
        """Arguments of a forward of prompts, each once."""
        plain, inputs = unwrapped(self.model), batch.inputs
        layout = layout_of(plain.config)
        found = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found |= layout.named_types(inputs.get("mm_token_type_ids"))
        return found | layout.features(plain.base_model, inputs, batch.rows, [1] * len(inputs["input_ids"]))

    def _positions(self, prompts: Sequence[Prompt]) -> Tensor:
        """Positions of left-padded prompts; found once per prompt and kept with it."""
        width, found = max(len(prompt) for prompt in prompts), []
        for prompt in prompts:
            if prompt.positions is None:
                prompt.positions = prompt_positions(self.model, one_row(prompt))[..., 0, :]
            found.append(torch.nn.functional.pad(prompt.positions, (width - len(prompt), 0), value=1))
        return torch.stack(found, dim=-2)

    def pick(self, logits: Tensor, sampling: Sampling, draws: Tensor, suppressed: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) sampled ids and (B,) fp32 log-probabilities from (B, V) logits and a number in [0, 1) for each row."""
        scores = (logits.float() / (sampling.temperature or 1.0)).log_softmax(-1)
        allowed = scores.index_fill(-1, suppressed, -torch.inf)
        if sampling.temperature == 0:
            token = allowed.argmax(-1)
        else:
            token = draw_token(_nucleus(allowed.softmax(-1), sampling.top_p), draws)
        return token, scores.gather(-1, token[:, None])[:, 0]


def batches(
    lengths: Sequence[int], sampling: Sampling, batch_tokens: int, *, shared: bool = False
) -> list[list[tuple[int, slice]]]:
    """Prompts of so many tokens, longest first, in batches of (prompt, which of its responses).

    Rows of a batch are padded to its longest prompt, and are at most ``batch_tokens`` tokens together with the longest
    possible responses (at least one row). A group is split only when it does not fit into a batch of its own. shared:
    a prompt's tokens count once, not for each of its rows.
    """
    found: list[list[tuple[int, slice]]] = []
    width = free = 0  # longest prompt of the last batch, and the tokens that it can still take

    def rows_in(tokens: int, width: int) -> int:
        return (tokens - width) // sampling.max_new_tokens if shared else tokens // (width + sampling.max_new_tokens)

    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        first = 0
        while first < sampling.group_size:
            fits = max(1, rows_in(batch_tokens, lengths[index]))
            wanted = sampling.group_size - first
            room = rows_in(free, width) if found else 0
            if room <= 0 or room < wanted <= fits:
                found.append([])
                width, free, room = lengths[index], batch_tokens, fits
            last = first + min(wanted, room)
            found[-1].append((index, slice(first, last)))
            rows, first = last - first, last
            free -= rows * sampling.max_new_tokens + width * (1 if shared else rows)
    return found


def one_row(prompt: Prompt) -> dict[str, Tensor]:
    """Inputs that positions depend on, of one prompt without padding: (1, P) ids, mask, types, and sizes of media."""
    row = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones_like(prompt.input_ids[None])}
    if prompt.token_types is not None:
        row["mm_token_type_ids"] = prompt.token_types[None]
    return row | {name: value for name, value in prompt.vision.items() if "pixel" not in name}


def draw_token(probabilities: Tensor, draws: Tensor) -> Tensor:
    """(B,) int64: the token at which the running sum of (B, V) probabilities passes the share ``draws`` (B,) of all.

    A token of probability 0 is never drawn. Sums are fp64: a vocabulary's tail would be lost in fp32.
    """
    sums = probabilities.double().cumsum(-1)
    total = sums[:, -1:]
    # Strictly below the total, which rounding of the product may reach.
    wanted = torch.minimum(draws[:, None].double() * total, torch.nextafter(total, torch.zeros_like(total)))
    # Sums that are NaN find no place: the index stays within the vocabulary, and the caller sees the NaN.
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)


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
