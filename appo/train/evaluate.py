"""Answers to held-out records, and how good they are: accuracy, format, temporal IoU, length, accuracy per task."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from appo.config import APPOConfig
from appo.data.prompts import Prompt, PromptBuilder
from appo.data.records import DataError, Record
from appo.rollout.engine import Rollout, Sampling, checked, seed_of
from appo.rollout.model_engine import TransformersRollout
from appo.rollout.rewards import combine
from appo.train.grade import grade, texts_of
from appo.train.logs import Meter
from appo.train.looking import measure_looking, record_mass
from appo.train.policy import Policy
from appo.train.setup import autocast

logger = logging.getLogger("appo")

Answer = dict[str, Any]  # one response to one record: text, measures, and what `evaluate` says of its keys


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
    keep: Callable[[Answer], None] | None = None,
    known: Mapping[int, Sequence[Answer]] | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Answer every record, ``config.eval_batch`` at a time: greedily, or ``config.eval_samples`` times as in training.

    engine: what answers; None: the model itself, in ``config.dtype``. builder: keeps decoded prompts from one
    evaluation to the next. show: called with the number of records done. keep: called with each answer as soon as
    there is one: ``place`` of the record in ``records``, ``id``, ``task`` where it names one, the right ``answer``, the
    response's ``text`` and its measures, None where one does not apply; with ``config.eval_looking`` also ``looked``,
    (mean, weight) of what the answers to the record looked at. known: answers that were kept before, by place:
    they count, and are not asked for again. accelerator: every process takes a share and gets the means of all.

    Returns the means by name: ``accuracy``, ``accuracy/<task>`` where records name one, ``format``,
    ``temporal_iou`` where records ask for times, ``length``, ``unreadable``, the share of answers that could not be
    read, and ``records``, their number; with ``config.eval_looking`` also ``mass/...``, what answers looked at; with
    ``on_broken: skip`` also ``broken``, how many other records could not be decoded.
    """
    known, places = known or {}, range(len(records))
    if accelerator is not None:
        places = places[accelerator.process_index :: accelerator.num_processes]
    model.eval()
    builder = builder or PromptBuilder(processor, model.config, config)
    engine = engine or TransformersRollout(model, processor, batch_tokens=config.rollout_tokens)
    sampling = Sampling(
        group_size=max(1, config.eval_samples),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature if config.eval_samples else 0.0,
        top_p=config.top_p,
    )
    meter, done = Meter(), 0
    for place in places:
        for answer in known.get(place, ()):
            _measure(meter, answer)
    asked = [place for place in places if place not in known]
    for start in range(0, len(asked), config.eval_batch):
        batch = asked[start : start + config.eval_batch]
        prompts = _prompts(builder, records, batch, config, meter)
        seeds = [seed_of(config.seed, place) for place in prompts]
        with autocast(config, next(model.parameters()).device):
            found = engine.generate(list(prompts.values()), sampling, seeds) if prompts else []
        checked(found, engine, list(prompts.values()), sampling)
        completions = [completion for group in found for completion in group]
        of_place = [place for place in prompts for _ in range(sampling.group_size)]
        part, texts = [records[place] for place in of_place], texts_of(completions, processor.tokenizer)
        looked = _looked(model, processor, config, prompts, found) if config.eval_looking else {}
        names = {"accuracy": 1.0, "format": 1.0}
        if any(record.asks_time for record in part):
            names["temporal_iou"] = 1.0
        rewards = combine(names, texts, part, lenient=config.rewards_lenient)
        for row, (place, record) in enumerate(zip(of_place, part, strict=True)):
            answer = {"place": place, "id": record.id, "answer": record.answer, "text": texts[row]}
            if "task" in record.meta:
                answer["task"] = record.meta["task"]
            values = {name: float(by_row[row]) for name, by_row in rewards.by_name.items()}
            answer |= {name: None if math.isnan(value) else value for name, value in values.items()}
            answer["length"] = float(len(completions[row].ids))
            answer["unreadable"] = float(rewards.unreadable["accuracy"][row])
            if place in looked:  # once for all answers to a record
                answer["looked"] = looked.pop(place)
            _measure(meter, answer)
            if keep is not None:
                keep(answer)
        done += len(batch)
        show(len(places) - len(asked) + done)
    means = meter.means() if accelerator is None else meter.result(accelerator)
    broken = means.pop("broken", 0.0) * len(records)
    return means | {"records": len(records) - broken} | ({"broken": broken} if broken else {})


def _prompts(
    builder: PromptBuilder, records: Sequence[Record], places: Sequence[int], config: APPOConfig, meter: Meter
) -> dict[int, Prompt]:
    """The prompts of records by place, without those that cannot be read when ``on_broken`` is "skip"."""
    prompts = {}
    for place in places:
        try:
            prompts[place] = builder(records[place])
        except DataError as error:
            if config.on_broken == "stop":
                raise
            logger.warning("skipped: %s", error)
        meter.add("broken", float(place not in prompts))
    return prompts


def _measure(meter: Meter, answer: Mapping[str, Any]) -> None:
    for name in ("accuracy", "format", "temporal_iou", "length", "unreadable"):
        value = answer.get(name)
        if value is not None:
            meter.add(name, value)
    if "task" in answer:
        meter.add(f"accuracy/{answer['task']}", answer["accuracy"])
    for name, (mean, weight) in answer.get("looked", {}).items():
        meter.add(name, mean, weight)


def _looked(
    model: nn.Module, processor: Any, config: APPOConfig, prompts: Mapping[int, Prompt], found: Sequence[Any]
) -> dict[int, dict[str, tuple[float, float]]]:
    """Shares of attention on the video while the answers to each place were written, as (mean, weight) by name: one
    more forward over each prompt's answers."""
    policy, tokenizer = Policy(model, "off"), processor.tokenizer
    device, looked = next(model.parameters()).device, {}
    for (place, prompt), completions in zip(prompts.items(), found, strict=True):
        group = grade(prompt, completions, tokenizer, {"accuracy": 1.0}, config)
        record_mass([group], policy, policy, config, tokenizer.pad_token_id, device)
        if group.mass is not None:
            meter = Meter()
            measure_looking(meter, group)
            looked[place] = meter.weighted()
    return looked
