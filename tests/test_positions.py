"""Positions of text behind a video: the original rule against its own definition, in every forward that uses it."""

import copy
import dataclasses

import pytest
import torch
import training
import vision_models

from appo.config import ConfigError
from appo.data.prompt_batch import collate
from appo.data.prompts import PromptBuilder
from appo.models.loaded import prompt_positions
from appo.models.positions import rule_of, use_positions
from appo.rollout.build import build_engine
from appo.rollout.engine import Sampling
from appo.rollout.model_engine import TransformersRollout
from appo.train.grade import grade
from appo.train.groups import batch_parts, whole_groups
from appo.train.policy import Policy
from appo.train.trainer import Trainer


def original_positions(types, grids, times, side=2, per_second=1.0):
    """The models' original rule for one row without padding: each part starts after the largest position before it.

    grids, times: of images (type 1) and videos (type 2), by type: lists of (t, h, w) and of seconds per grid step.
    """
    found, start, index, used = [], 0, 0, {1: 0, 2: 0}
    while index < len(types):
        kind = types[index]
        if kind == 0:
            part = torch.full((3, 1), start)
        else:
            t, h, w = grids[kind][used[kind]]
            seconds = times[used[2]] if kind == 2 else 1 / per_second
            used[kind] += 1
            part = torch.cartesian_prod(
                (torch.arange(t) * per_second * seconds).long(), torch.arange(h // side), torch.arange(w // side)
            ).T
            part = part.reshape(3, -1) + start
        found.append(part)
        index += part.shape[1]
        start = int(part.max()) + 1
    return torch.cat(found, 1)


@pytest.fixture
def prompts(tmp_path):
    """Of different lengths: one video, two videos, a video and an image, an image alone, text alone."""
    model, processor = training.tiny()
    builder = PromptBuilder(processor, model.config, training.config(tmp_path))
    first, second = training.records()[:2]
    picture = training.with_image(first, tmp_path / "a.png")
    found = [
        builder(record)
        for record in (
            first,
            dataclasses.replace(first, media=first.media + second.media),
            dataclasses.replace(first, media=first.media + picture.media),
            picture,
        )
    ]
    return model, processor, found


def expected_of(prompt, per_second):
    grids = {
        kind: prompt.vision[name].tolist() if name in prompt.vision else []
        for kind, name in ((1, "image_grid_thw"), (2, "video_grid_thw"))
    }
    times = prompt.vision["second_per_grid_ts"].tolist() if grids[2] else []
    return original_positions(prompt.token_types.tolist(), grids, times, per_second=per_second)


def test_the_original_rule_in_a_padded_batch(prompts):
    model, processor, prompts = prompts
    inputs = collate(prompts, processor.tokenizer.pad_token_id, "cpu").inputs
    found = prompt_positions(use_positions(model, "original"), inputs)
    for row, prompt in enumerate(prompts):
        expected = expected_of(prompt, model.config.vision_config.tokens_per_second)
        assert torch.equal(found[:, row, -len(prompt) :], expected)
        assert (expected[:, -1] == expected.max()).all()  # text goes on after everything


def test_padding_on_the_right_and_deltas(prompts):
    model, _, (prompt, *_) = prompts
    use_positions(model, "original")
    inputs = collate([prompt], 0, "cpu").inputs
    named = {k: v for k, v in inputs.items() if k not in ("pixel_values_videos",)}
    alone, delta = model.model.get_rope_index(**named)
    padded = named | {
        name: torch.nn.functional.pad(named[name], (0, 3))
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    found, padded_delta = model.model.get_rope_index(**padded)
    assert torch.equal(found[..., : len(prompt)], alone)
    # A token decoded next is one after the prompt's last.
    assert delta.item() + len(prompt) == alone.max() + 1 and torch.equal(delta, padded_delta)


# The positions that models were trained with, and those of transformers.
@pytest.mark.parametrize("rule", ["original", "transformers"])
def test_sampling_packed_and_padded_scoring_agree(prompts, rule, tmp_path):
    """The rule reaches every forward: where one of them had another, log-probabilities would differ."""
    model, processor, (prompt, *_) = prompts
    model, config = use_positions(model.eval(), rule), training.config(tmp_path)
    completions = TransformersRollout(model, processor).generate([prompt], Sampling(2, 5), [3])[0]
    group = grade(prompt, completions, processor.tokenizer, {"length_parity": 1.0}, config)
    batch = batch_parts(whole_groups([group]), processor.tokenizer.pad_token_id, "cpu")
    for share in ("off", "on"):
        with torch.no_grad():
            scores = Policy(model, share)(batch, lambda hidden, weight, bias: (hidden @ weight.T).log_softmax(-1))
        found = scores.gather(-1, batch.completion_ids[..., None])[..., 0]
        torch.testing.assert_close(found[batch.mask], group.rollout_logprobs[group.mask], rtol=1e-4, atol=1e-4)


def test_the_rule_is_the_settings_and_survives_a_copy(tmp_path):
    for settings, rule in (({}, "original"), ({"video_positions": "transformers"}, "transformers")):
        model, processor = training.tiny()
        trainer = Trainer(model, processor, training.records(), config=training.config(tmp_path, **settings))
        assert rule_of(trainer.model) == rule
        copied = copy.deepcopy(trainer.model)
        assert rule_of(copied) == rule
        if rule == "original":  # of the copy, not of the model that was copied
            assert copied.model.get_rope_index.__self__ is copied.model


def test_models_that_set_frames_off_by_text_are_left_alone():
    model, _ = vision_models.build("qwen3_vl")
    use_positions(model, "original")
    assert rule_of(model) == "transformers"


def test_an_engine_with_the_original_positions_alone(tmp_path):
    model, processor = training.tiny()
    config = training.config(tmp_path, video_positions="transformers", engine="vllm-server", vllm_python="python3")
    with pytest.raises(ConfigError, match=r"`video_positions`: expected original with engine = vllm-server"):
        build_engine(config, model, processor)
