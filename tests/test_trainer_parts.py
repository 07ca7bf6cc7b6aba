"""The parts of a step that a user may replace: engine, choice of frames, token weights, loss."""

import itertools
import json

import pytest
import torch
import training

from appo.rollout import rewards
from appo.rollout.engine import Completion
from appo.train.evaluate import evaluate
from appo.train.rules import weigh_tokens
from appo.train.trainer import Trainer
from appo_kernels import linear_weighted_surrogate


class Recited:
    """An engine without a model: it answers by rote, and keeps what it was given."""

    def __init__(self, processor, answers):
        self.processor, self.answers = processor, answers
        self.version, self.calls, self.updates = None, [], []

    def generate(self, prompts, sampling, seeds):
        self.calls.append((list(prompts), sampling, list(seeds)))
        return [[self._answer(number) for number in range(sampling.group_size)] for _ in prompts]

    def update_weights(self, model, version):
        self.version = version
        self.updates.append((version, next(model.parameters()).detach().clone()))

    def _answer(self, number):
        ids = self.processor.tokenizer(self.answers[number % len(self.answers)])["input_ids"]
        ids = torch.tensor([*ids, self.processor.tokenizer.eos_token_id])
        return Completion(ids, torch.full(ids.shape, -0.5), "stop", self.version)


def test_any_engine_samples_for_training_and_evaluation(tmp_path):
    model, processor = training.tiny()
    engine = Recited(processor, ["red", "blue", "a"])
    settings = training.config(tmp_path, max_steps=2, eval_every=1)
    held_out = training.records()[:3]
    trainer = Trainer(model, processor, training.records(), config=settings, engine=engine, eval_dataset=held_out)
    trainer.train()
    assert [len(prompts) for prompts, _, _ in engine.calls] == [3, 4, 3, 4, 3], "evaluation, step, evaluation, ..."
    assert [sampling.group_size for _, sampling, _ in engine.calls] == [1, 4, 1, 4, 1]
    assert [sampling.temperature for _, sampling, _ in engine.calls] == [0, 1, 0, 1, 0]
    # Weights arrive before the first rollout and after each step, once, and are those in training.
    assert [version for version, _ in engine.updates] == [0, 1, 2]
    assert not torch.equal(engine.updates[0][1], engine.updates[1][1])
    assert [group.texts[0].strip() for group in trainer.groups] == ["red"] * 4
    assert trainer.groups[0].finished.all() and (trainer.groups[0].rollout_logprobs[0, :2] == -0.5).all()
    seeds = [seed for _, sampling, part in engine.calls if sampling.temperature for seed in part]
    assert len(set(seeds)) == len(seeds), "each place in the order of records has its own"


def test_prompts_bring_what_an_engine_in_another_process_needs(tmp_path):
    """The rendered chat, decoded frames with their times, ids and the processor's tensors."""
    model, processor = training.tiny()
    engine = Recited(processor, ["red"])
    evaluate(model, processor, training.records()[:2], training.config(tmp_path), engine=engine)
    ((prompts, _, _),) = engine.calls
    for prompt in prompts:
        assert prompt.record.question in prompt.text and prompt.text.count("<|video_pad|>") == 1
        (clip,) = prompt.clips
        assert clip.frames.dtype == torch.uint8 and len(clip.timestamps) == len(clip.frames) and clip.source_fps > 0
        encoded = processor(
            text=[prompt.text], videos=[clip.frames], return_tensors="pt",
            videos_kwargs={"do_sample_frames": False, "do_resize": False},
        )  # fmt: skip
        assert torch.equal(encoded["input_ids"][0], prompt.input_ids), "text and frames give the ids again"
        torch.testing.assert_close(encoded["pixel_values_videos"], prompt.vision["pixel_values_videos"])


def test_an_engine_that_returns_too_little_is_named(tmp_path):
    model, processor = training.tiny()
    engine = Recited(processor, ["red"])
    engine.generate = lambda prompts, sampling, seeds: []
    trainer = Trainer(model, processor, training.records(), config=training.config(tmp_path), engine=engine)
    with pytest.raises(ValueError, match=r"Recited\.generate: expected 4 completions for each of 4 prompts"):
        trainer.step(1)


def test_frames_weights_and_loss_are_functions(tmp_path):
    seen = []

    def labelled(group, config):
        assert group.mass.shape[2] == group.prompt.num_frames and group.entropy.shape == group.mask.shape
        return torch.tensor(group.prompt.labelled_frames(), dtype=torch.int64)

    def doubled(group, divergence, config):
        slots = torch.zeros(1, 4, 1, dtype=torch.int64)  # the first token of every response
        assert divergence(slots).shape == (1, 1) and divergence(slots) >= 0
        return 2 * weigh_tokens(group, divergence, config)

    def counted(hidden, weight, targets, **arguments):
        seen.append((targets.shape, arguments["token_weights"], arguments["num_items"]))
        return linear_weighted_surrogate(hidden, weight, targets, **arguments)

    model, processor = training.tiny()
    trainer = Trainer(
        model, processor, training.records(), config=training.config(tmp_path, sample_every=1),
        choose_frames=labelled, weigh_tokens=doubled, surrogate=counted,
    )  # fmt: skip
    metrics = trainer.step(1)
    assert metrics["frames/recall"] == metrics["frames/precision"] == 1 and metrics["weight/mean"] >= 2
    assert len(seen) == 2, "two micro-batches"
    assert all((weights[weights > 0] >= 2).all() for _, weights, _ in seen)
    assert {items for _, _, items in seen} == {sum(group.tokens for group in trainer.groups)}


def test_a_subclass_may_replace_a_part(tmp_path):
    class Uniform(Trainer):
        def select(self, groups):
            for group in groups:
                group.target_frames = torch.arange(group.prompt.num_frames)

    model, processor = training.tiny()
    trainer = Uniform(model, processor, training.records(), config=training.config(tmp_path))
    assert trainer.step(1)["frames/target"] == 8


def test_groups_without_frames_have_weight_one_among_others_that_have_them(tmp_path):
    """Text, image and video records in one micro-batch: only a video has frames."""
    model, processor = training.tiny()
    video, text, *_ = training.records()
    records = [video, training.without_media(text), training.with_image(text, tmp_path / "picture.png"), video]
    settings = training.config(tmp_path / "run", micro_groups=4, max_steps=1, sample_every=1)
    trainer = Trainer(model, processor, records, config=settings)
    trainer.train()
    by_frames = {group.prompt.num_frames: group for group in trainer.groups}
    assert set(by_frames) == {0, 8}
    assert by_frames[0].weights is None and by_frames[0].mass is None and by_frames[0].scored
    assert by_frames[8].weights.max() > 1
    (sample,) = (json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines())
    assert len(sample["completions"]) == 4
    (metrics,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert metrics["grad_norm"] > 0


def test_a_batch_without_any_frames_trains(tmp_path):
    model, processor = training.tiny()
    records = [training.without_media(record) for record in training.records()[:4]]
    trainer = Trainer(model, processor, records, config=training.config(tmp_path))
    metrics = trainer.step(1)
    assert metrics["grad_norm"] > 0 and "weight/mean" not in metrics


@rewards.register("by_place")
def by_place(completions, records):
    """Differs within a group whatever the responses say."""
    return [float(place % 2) for place in range(len(completions))]


class Silent:
    """An engine whose responses have so many tokens, by prompt in turn."""

    def __init__(self, *lengths):
        self.lengths = itertools.cycle(lengths)

    def generate(self, prompts, sampling, seeds):
        found = []
        for length in itertools.islice(self.lengths, len(prompts)):
            ids = torch.arange(sampling.group_size * length).view(sampling.group_size, length) % 7 + 5
            found.append([Completion(row, torch.full((length,), -1.0), "stop", 0) for row in ids])
        return found

    def update_weights(self, model, version):
        pass


# In one row, one by one, split by tokens; every count that a loss is divided by is 0 where all responses are empty.
@pytest.mark.parametrize("changes", [{}, {"micro_groups": 1}, {"micro_tokens": 40}, {"share_prompt": "off"}], ids=str)
@pytest.mark.parametrize("aggregation", ["dapo", "bnpo"])
def test_responses_without_a_token_train_nothing(aggregation, changes, tmp_path):
    model, processor = training.tiny()

    def step(*lengths):
        settings = {"aggregation": aggregation, "rewards": {"by_place": 1.0}, "max_steps": 1, "beta": 0.1} | changes
        config = training.config(tmp_path / str(len(lengths)), **settings)
        trainer = Trainer(model, processor, training.records(), config=config, engine=Silent(*lengths))
        return trainer, trainer.step(1)

    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer, metrics = step(0)
    assert metrics["grad_norm"] == 0 and metrics["length/mean"] == 0
    assert all(group.weights is None and group.target_frames is None for group in trainer.groups)
    decayed = 1 - trainer.config.learning_rate * trainer.config.weight_decay
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old * decayed, rtol=1e-6, atol=0)
    trainer, metrics = step(0, 3)  # beside groups that have tokens
    assert metrics["grad_norm"] > 0
    assert [group.weights is None for group in trainer.groups] == [True, False] * (len(trainer.groups) // 2)
