"""Runs of the tests: trainers, what they wrote, and comparisons of it."""

import json

import torch
import training

from appo.train.trainer import Trainer
from appo_kernels import linear_weighted_surrogate


def make(output, records=None, model_seed=0, engine=None, surrogate=linear_weighted_surrogate, **changes):
    model, processor = training.tiny(model_seed)
    records = training.records() if records is None else records
    settings = training.config(output, **changes)
    return Trainer(model, processor, records, config=settings, engine=engine, surrogate=surrogate)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def without_time(records):
    return [{k: v for k, v in record.items() if not k.startswith(("time/", "memory/"))} for record in records]


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
