"""A supervised warm start: the tiny model learns to see the easy split and to answer in the right format,
with labels often wrong.

Two things are taught. *Seeing*: what the vision tower says about each temporal grid step, read through the
language model's own head, is to be the word for what happens in it, or "nothing". That is a dense signal and
costs no pass through the text model, so it comes first. *Answering*: the response format, with what was seen
and when.

Answers are wrong on purpose in a share of the examples. A model that was taught right answers only is sure of
its answer, right or wrong: all responses of a group then get the same reward, and reinforcement learning has
nothing to go by. With labels drawn at random now and then it keeps trying the other answers too, while its
best guess stays as good.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from appo.data.prompt_batch import collate
from appo.data.prompts import Prompt
from appo.data.records import Record
from appo.tasks import response_text, think_text
from appo.tasks.questions import NUMBERS
from appo.tasks.thoughts import IRRELEVANT_WORDS, Irrelevant

NOTHING = "nothing"


@dataclass(frozen=True)
class WarmUpStats:
    """Means over the last tenth: loss of a response token, and share of the grid steps with an event named rightly."""

    loss: float
    seen: float
    steps: int


def warm_up(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    *,
    looking_steps: int = 50,
    steps: int = 100,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    label_noise: float = 0.5,
    irrelevant: Irrelevant | None = None,
    plain_steps: int = 0,
    seed: int = 0,
    progress: Callable[[int, float, float], None] = lambda step, loss, seen: None,
) -> WarmUpStats:
    """Trains ``model`` in place on ``prompts`` made by ``PromptBuilder`` of records of ``appo.tasks``.

    looking_steps: optimizer steps that train the vision tower alone; ``steps`` that train everything follow.
    label_noise: share of the examples whose answer is drawn at random, anew each time. irrelevant: words around what
    was seen, drawn anew each time; None: none. plain_steps: the first of ``steps``, which have no such words: the
    sentence is learned before it is hidden.
    progress: called after each step with its number, from 1, the loss of a response token (nan while only looking), and
    the share of events that were seen. Deterministic by ``seed``; the global generators are not used. Raises ValueError
    for a record that is not of ``appo.tasks``.
    """
    rng = random.Random(seed)
    batches = _batches(prompts, batch_size, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    total = looking_steps + steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=0.1)
    history: list[tuple[float, float]] = []
    model.train()
    for step in range(1, total + 1):
        chosen = next(batches)
        inputs: dict[str, Any] = dict(collate(chosen, processor.tokenizer.pad_token_id).inputs)
        features = model.base_model.get_video_features(
            inputs.pop("pixel_values_videos"), inputs["video_grid_thw"], return_dict=True
        )
        loss, seen = _looking(model, processor.tokenizer, chosen, features.pooler_output)
        answering = torch.tensor(float("nan"))
        if step > looking_steps:
            inputs["mm_encoder_outputs"] = {"video": features}
            around = None if step <= looking_steps + plain_steps else irrelevant
            answers = [target(prompt, rng, label_noise, around) for prompt in chosen]
            answering = _answering(model, processor.tokenizer, inputs, answers, around)
            loss = loss + answering
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        history.append((float(answering.detach()), float(seen)))
        progress(step, *history[-1])
    model.eval()
    last = history[-max(steps // 10, 1) :]
    return WarmUpStats(*(sum(values) / len(last) for values in zip(*last, strict=True)), steps=total)


def target(prompt: Prompt, rng: random.Random, label_noise: float, irrelevant: Irrelevant | None = None) -> str:
    """The response to learn: what happened and when or, in a share ``label_noise``, an answer drawn at random.

    For a record that says what is seen when (the kind "cue"), the time is drawn, and the answer is what is seen then:
    right or wrong, a response reports what it looked at.
    """
    record = prompt.record
    task, steps = record.meta["task"], [_nearest(prompt, start, end) for start, end in record.time_spans]
    index, seen = _answer(record), record.meta.get("seen")
    if seen:  # the time is told by its number, not by a grid step
        steps = [time_marked(record)]
    if rng.random() < label_noise:
        if seen:  # any time, and then the colour that is shown there
            steps = [rng.randrange(len(seen))]
            index = [option.split(". ", 1)[1] for option in record.options].index(seen[steps[0]][2])
        else:
            index = rng.randrange(len(record.options))
        if task == "count":  # as many moments as the answer says
            steps = sorted(rng.sample(range(prompt.num_frames), index + 1))
    letter, text = record.options[index].split(". ", 1)
    think = think_text(task, steps, text)
    return response_text(think if irrelevant is None else irrelevant.around(think, rng), letter)


def words_seen(prompt: Prompt) -> list[str]:
    """A word for each temporal grid step: what happens in a video frame sampled for it, or "nothing".

    Where the record says what is shown when, it is what is shown in the middle of the step.
    """
    record = prompt.record
    if "seen" in record.meta:
        middles = [sum(times) / 2 for times in prompt.frame_times]
        return [next(word for _, end, word in record.meta["seen"] if middle < end) for middle in middles]
    answer = record.options[_answer(record)].split(". ", 1)[1]
    words = [NOTHING] * prompt.num_frames
    for number, (start, end) in enumerate(record.time_spans):
        for frame, times in enumerate(prompt.frame_times):
            if any(start <= time < end for time in times):
                # Counted events are alike, and of two colours in a row only the first is in the record: they
                # are a flash.
                alike = record.meta["task"] == "count" or number > 0
                words[frame] = "flash" if alike else answer
    return words


def time_marked(record: Record) -> int:
    """Index into the record's ``seen`` that the mark of the kind "cue" points at; -1 without a mark."""
    starts = [start for start, _, _ in record.meta.get("seen", ())]
    return starts.index(record.time_spans[0][0]) if starts else -1


def _looking(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], features: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the word for each grid step, events weighing as much as quiet; and the share of events named.

    Where clips have a mark, also that of the time it points at, read off every step.
    """
    words = [word for prompt in prompts for word in words_seen(prompt)]
    labels = torch.tensor(tokenizer.convert_tokens_to_ids(words))
    steps = [part.view(prompt.num_frames, -1, part.shape[-1]) for prompt, part in zip(prompts, features, strict=True)]
    pooled = torch.cat([part.mean(1) for part in steps])  # (grid steps of the batch, D)
    logits = model.get_output_embeddings()(model.base_model.language_model.norm(pooled))
    quiet = labels == tokenizer.convert_tokens_to_ids(NOTHING)
    losses = cross_entropy(logits, labels, reduction="none")
    sides = [losses[side].mean() for side in (quiet, ~quiet) if side.any()]
    loss = sum(sides, torch.zeros(())) / len(sides)
    marked = torch.tensor([time for prompt in prompts for time in [time_marked(prompt.record)] * prompt.num_frames])
    if (marked >= 0).any():
        # Every frame of a clip with a mark shows two things: its own colour, and which time the mark points at.
        numbers = tokenizer.convert_tokens_to_ids(NUMBERS)
        loss = loss + cross_entropy(logits[:, numbers], marked, ignore_index=-1)
    return loss, (logits.argmax(-1) == labels)[~quiet].float().mean()


def _answering(
    model: Any, tokenizer: Any, inputs: dict[str, Any], responses: Sequence[str], irrelevant: Irrelevant | None
) -> Tensor:
    """Mean negative log-likelihood of the responses' tokens, the end token included.

    With irrelevant words it is the mean of two: over tokens in whose place one might stand, and over the others.
    Otherwise their entropy, which cannot be learned away, drowns the sentence: three responses of ten came without it.
    """
    encoded = [tokenizer(text + tokenizer.eos_token, add_special_tokens=False).input_ids for text in responses]
    length = max(len(ids) for ids in encoded)
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in encoded])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], 1)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    logits = model(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    if irrelevant is None:
        return cross_entropy(logits[mask.bool()], ids[mask.bool()])
    losses = cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    # "i" and the closing tag end a run of irrelevant words: a weight of their own would shorten the runs.
    choices = tokenizer.convert_tokens_to_ids([*IRRELEVANT_WORDS, "i", "</think>"])
    open_ = torch.isin(ids, torch.tensor(choices)) & mask.bool()
    return (losses[open_].mean() + losses[mask.bool() & ~open_].mean()) / 2


def _batches(prompts: Sequence[Prompt], size: int, rng: random.Random) -> Any:
    for prompt in prompts:
        if "task" not in prompt.record.meta or not prompt.record.options or not prompt.record.time_spans:
            _not_ours(prompt.record)
    order: list[int] = []
    while True:
        while len(order) < size:
            order += rng.sample(range(len(prompts)), len(prompts))
        yield [prompts[i] for i in order[:size]]
        order = order[size:]


def _nearest(prompt: Prompt, start: float, end: float) -> int:
    """The temporal grid step whose time on screen is nearest to the middle of a moment."""
    first = [times[0] for times in prompt.frame_times]
    length = (first[-1] - first[0]) / (len(first) - 1) if len(first) > 1 else 0.0
    middles = [begin + length / 2 for begin in first]
    return min(range(len(middles)), key=lambda f: abs(middles[f] - (start + end) / 2))


def _answer(record: Record) -> int:
    return "ABCDEFGH".index(record.answer)


def _not_ours(record: Record) -> NoReturn:
    raise ValueError(
        f"warm_up: `prompts`: expected records of appo.tasks, with `task`, `options` and `time_spans`, got "
        f"{record.id!r} without. Only clips whose deciding moments are known can be explained to the model."
    )
