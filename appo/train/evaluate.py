"""Answers to held-out records, and how good they are: accuracy, format, temporal IoU, length, accuracy per task."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from appo.config import APPOConfig
from appo.data.prompts import Prompt, PromptBuilder
from appo.data.records import Record
from appo.rollout.engine import Completion, Rollout, Sampling, TransformersRollout, checked, seed_of
from appo.rollout.rewards import combine
from appo.train.grade import grade, texts_of
from appo.train.logs import Meter
from appo.train.looking import measure_looking, record_mass
from appo.train.policy import Policy


@torch.no_grad()
def evaluate(
    model: nn.Module,
    processor: Any,
    records: Sequence[Record],
    config: APPOConfig,
    *,
    engine: Rollout | None = None,
    builder: PromptBuilder | None = None,
    show: Callable[[int], None] = lambda done: None,
    keep: list[dict[str, Any]] | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Answer every record, ``config.eval_batch`` at a time: greedily, or ``config.eval_samples`` times as in training.

    engine: what answers; None: the model itself. builder: keeps decoded prompts from one evaluation to the next.
    show: called with the number of records done. keep: a list that receives each answer.
    accelerator: every process takes a share and gets the means of all.

    Returns the means by name: ``accuracy``, ``accuracy/<task>`` where records name one, ``format``,
    ``temporal_iou`` where records ask for times, ``length``, ``unreadable``, the share of answers that could not be
    read, and ``records``, their number; with ``config.eval_looking`` also ``mass/...``, what answers looked at.
    """
    total, places = len(records), range(len(records))
    if accelerator is not None:
        places = places[accelerator.process_index :: accelerator.num_processes]
    model.eval()
    builder = builder or PromptBuilder(processor, model.config, config)
    engine = engine or TransformersRollout(model, processor)
    sampling = Sampling(
        group_size=max(1, config.eval_samples),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature if config.eval_samples else 0.0,
        top_p=config.top_p,
    )
    meter = Meter()
    for start in range(0, len(places), config.eval_batch):
        batch = places[start : start + config.eval_batch]
        prompts = [builder(records[place]) for place in batch]
        seeds = [seed_of(config.seed, place) for place in batch]
        answers = checked(engine.generate(prompts, sampling, seeds), engine, prompts, sampling)
        completions = [completion for group in answers for completion in group]
        part = [prompt.record for prompt in prompts for _ in range(sampling.group_size)]
        texts = texts_of(completions, processor.tokenizer)
        if config.eval_looking:
            _look(meter, model, processor, config, list(zip(prompts, answers, strict=True)))
        names = {"accuracy": 1.0, "format": 1.0}
        if any(record.asks_time for record in part):
            names["temporal_iou"] = 1.0
        rewards = combine(names, texts, part, lenient=config.rewards_lenient)
        scores = rewards.by_name
        lengths = [float(len(completion.ids)) for completion in completions]
        for row, (record, text) in enumerate(zip(part, texts, strict=True)):
            found = {name: float(values[row]) for name, values in scores.items()} | {"length": lengths[row]}
            for name, value in found.items():
                meter.add(name, value)
            if "task" in record.meta:
                meter.add(f"accuracy/{record.meta['task']}", found["accuracy"])
            meter.add("unreadable", float(rewards.unreadable["accuracy"][row]))
            if keep is not None:
                keep.append({"id": record.id, "answer": record.answer, "text": text} | found)
        show(start + len(prompts))
    return (meter.means() if accelerator is None else meter.result(accelerator)) | {"records": float(total)}


def _look(
    meter: Meter,
    model: nn.Module,
    processor: Any,
    config: APPOConfig,
    answered: Sequence[tuple[Prompt, Sequence[Completion]]],
) -> None:
    """Shares of attention on the video while the answers were written, by a forward over each prompt's answers."""
    policy, tokenizer = Policy(model, "off"), processor.tokenizer
    device = next(model.parameters()).device
    for prompt, completions in answered:
        group = grade(prompt, completions, tokenizer, {"accuracy": 1.0}, config)
        record_mass([group], policy, policy, config, tokenizer.pad_token_id, device)
        if group.mass is not None:
            measure_looking(meter, group)
