"""Sampling one step ahead: what overlaps, in which order, of which weights; nothing lost or trained on twice."""

import os
import signal
import threading

import pytest
import torch
import training

from appo.config import ConfigError
from appo.rollout.engine import Completion
from appo.train.ahead import forget_ahead
from appo.train.interrupt import Stopped
from appo.train.trainer import Trainer

WAIT = 60  # seconds after which what does not overlap is an error


class Clocked:
    """Recites answers of two lengths, and writes down what it is asked. Fails if it is asked two things at a time."""

    def __init__(self, processor, *, versioned=True):
        ids = processor.tokenizer(["red", "red blue"])["input_ids"]
        self.answers = [torch.tensor([*row, processor.tokenizer.eos_token_id]) for row in ids]
        self.events, self.version, self.versioned = [], -1, versioned
        self.busy = threading.Lock()
        self.before_generate = lambda: None

    def generate(self, prompts, sampling, seeds):
        assert self.busy.acquire(blocking=False), "the engine is asked while it works"
        try:
            version = self.version
            self.before_generate()
            self.events.append(("generate", version, tuple(seeds)))
            return [
                [
                    Completion(ids, torch.full(ids.shape, -3.0), "stop", version if self.versioned else 0)
                    for ids in (self.answers * sampling.group_size)[: sampling.group_size]
                ]
                for _ in prompts
            ]
        finally:
            self.busy.release()

    def update_weights(self, model, version):
        assert self.busy.acquire(blocking=False), "the engine is handed weights while it works"
        self.events.append(("weights", version))
        self.version = version
        self.busy.release()


def trainer_of(folder, engine=None, **settings):
    model, processor = training.tiny()
    engine = engine or Clocked(processor)
    config = training.config(folder, **{"max_steps": 4, "asynchronous": True, "prompts_per_step": 2} | settings)
    return Trainer(model, processor, training.records(), config=config, engine=engine)


def trained_on(trainer):
    """Seeds of the prompts of each step in turn, as they are trained on."""
    seen = []
    update = trainer.update

    def note(groups, number):
        seen.append([group.prompt.record.id for group in sorted(groups, key=lambda group: group.place)])
        update(groups, number)

    trainer.update = note
    return seen


def test_the_next_step_is_sampled_while_this_one_updates(tmp_path):
    """Sampling for step 2 waits until step 1 updates: were it not concurrent, neither would end."""
    trainer = trainer_of(tmp_path, max_steps=3)
    updating, sampled = threading.Event(), threading.Event()
    update, calls = trainer.update, []

    def before_generate():
        calls.append(threading.current_thread().name)
        if len(calls) > 1:
            assert updating.wait(WAIT), "sampling ahead did not overlap the update"
            sampled.set()

    def during_update(groups, number):
        updating.set()
        if number < 3:
            assert sampled.wait(WAIT), "the update did not overlap sampling ahead"
        update(groups, number)
        updating.clear()
        sampled.clear()

    trainer.engine.before_generate, trainer.update = before_generate, during_update
    ages = [trainer.step(number)["engine/age"] for number in (1, 2, 3)]
    assert ages == [0, 1, 1]
    assert calls[0] == "MainThread" and set(calls[1:]) == {"rollouts ahead"}
    assert [event[:2] for event in trainer.engine.events] == [
        ("weights", 0), ("generate", 0), ("generate", 0), ("weights", 1), ("generate", 1), ("weights", 2),
    ]  # fmt: skip


def test_the_same_records_in_the_same_order_as_one_after_another(tmp_path):
    orders, weights = [], []
    for name, settings in {"a": {}, "b": {}, "c": {"asynchronous": False}}.items():
        trainer = trainer_of(tmp_path / name, **settings)
        orders.append(trained_on(trainer))
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 4
    assert torch.equal(weights[0], weights[1])  # threads change nothing in the numbers


def test_a_run_that_is_stopped_loses_no_record_and_trains_on_none_twice(tmp_path):
    """SIGTERM in step 2, with responses of step 3 on their way; the run goes on in a new process's trainer."""
    whole = trainer_of(tmp_path / "whole")
    expected = trained_on(whole)
    whole.train()
    first = trainer_of(tmp_path / "run")
    seen = trained_on(first)
    update = first.update

    def stopped(groups, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        update(groups, number)

    first.update = stopped
    with pytest.raises(Stopped):
        first.train()
    assert first.ahead is not None, "responses of step 3 were on their way"
    second = trainer_of(tmp_path / "run")
    rest = trained_on(second)
    second.train()
    assert seen == expected[:2] and rest == expected[2:]


def test_an_error_of_the_engine_is_that_of_the_step_it_sampled_for(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    seen, calls = trained_on(trainer), []

    def fail():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the engine is gone")

    trainer.engine.before_generate = fail
    with pytest.raises(RuntimeError, match="the engine is gone"):
        trainer.train()
    assert len(seen) == 2  # both steps that had responses, and a checkpoint of the second
    again = trainer_of(tmp_path / "run")
    rest = trained_on(again)
    again.train()
    assert len(rest) == 2 and not set(map(tuple, seen)) & set(map(tuple, rest))
    trainer.engine.before_generate = lambda: None
    forget_ahead(trainer)
    assert trainer.sampler.taken == 4  # two steps of two records


def test_evaluation_waits_for_the_engine_and_has_the_newest_weights(tmp_path):
    model, processor = training.tiny()
    engine = Clocked(processor)
    config = training.config(tmp_path, max_steps=2, asynchronous=True, prompts_per_step=2, eval_every=1)
    held_out = training.records()[:1]
    Trainer(model, processor, training.records(), config=config, engine=engine, eval_dataset=held_out).train()
    evaluated = [event[1] for event in engine.events if event[0] == "generate" and len(event[2]) == 1]
    assert evaluated == [0, 1, 2]


def test_an_engine_has_to_say_which_weights_sampled(tmp_path):
    _, processor = training.tiny()
    trainer = trainer_of(tmp_path, Clocked(processor, versioned=False))
    with pytest.raises(ValueError, match=r"`asynchronous`: expected responses of weights 1.*got 0"):
        trainer.train()


def test_the_model_itself_cannot_sample_while_it_is_updated(tmp_path):
    model, processor = training.tiny()
    with pytest.raises(ConfigError, match=r"`asynchronous`.*vllm-server"):
        Trainer(model, processor, training.records(), config=training.config(tmp_path, asynchronous=True))
    with pytest.raises(ConfigError, match=r"`asynchronous`: expected false with engine = vllm"):
        training.config(tmp_path, asynchronous=True, engine="vllm")
