"""Qwen-Omni's thinkers: loaded out of the whole model, times of frames, sound that is never trained, rollouts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as hf
import vision_models
from transformers import AutoConfig

from appo.config import APPOConfig, ConfigError
from appo.data.prompt_batch import collate
from appo.data.prompts import PromptBuilder
from appo.data.records import DataError
from appo.models.loaded import prompt_positions, vision_token_ids
from appo.rollout.build import build_engine
from appo.train.setup import audio_towers, load_model, prepare_model

WHOLE = {
    "qwen2_5_omni_thinker": hf.Qwen2_5OmniForConditionalGeneration,
    "qwen3_omni_moe_thinker": hf.Qwen3OmniMoeForConditionalGeneration,
}


@pytest.fixture(params=WHOLE)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, APPOConfig]:
    model, processor = vision_models.build(request.param)
    reader = processor.video_processor
    return model, processor, training.config(tmp_path, max_pixels=(reader.patch_size * reader.merge_size) ** 2)


def test_the_thinker_is_read_out_of_the_whole_model(built: tuple[Any, Any, APPOConfig], tmp_path: Path) -> None:
    """Published folders hold thinker, talker and vocoder; a trained one holds the thinker, and is read again."""
    thinker, processor, _ = built
    kind = WHOLE[thinker.config.model_type]
    whole = kind(kind.config_class(thinker_config=thinker.config.to_dict(), enable_audio_output=False))
    whole.thinker.load_state_dict(thinker.state_dict())
    for name, model in (("whole", whole), ("final", thinker)):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        settings = APPOConfig(model=str(tmp_path / name), dtype="float32", max_pixels=32 * 32)
        loaded: Any = load_model(settings)[0]
        assert type(loaded) is type(thinker)
        for key, value in thinker.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key]), key
    assert AutoConfig.from_pretrained(tmp_path / "whole").model_type != thinker.config.model_type


def test_times_of_frames_are_those_of_the_clip(built: tuple[Any, Any, APPOConfig]) -> None:
    """The processor takes one rate for all; two clips of one prompt sampled at different rates keep their own."""
    model, processor, config = built
    builder = PromptBuilder(processor, model.config, config)
    record, other = training.records()[:2]
    short = dataclasses.replace(other.media[0], start=0.0, end=1.0)
    config.max_frames = 4
    prompt = builder(dataclasses.replace(record, media=(*record.media, short), time_spans=()))
    seconds = [(clip.end - clip.start) / 2 for clip in prompt.clips]  # two grid steps of each
    assert seconds[0] > 1.5 * seconds[1]
    assert prompt.vision["video_second_per_grid"].tolist() == pytest.approx(seconds)
    positions = prompt_positions(model, collate([prompt], 0).inputs)[0, 0]
    first, second = (positions[prompt.frame_ids == frame] for frame in (0, 1))
    counted = seconds[0] * model.config.position_id_per_seconds
    assert (second - first).tolist() in ([counted], [int(counted)])  # Qwen3-Omni counts parts of a position


def test_prompts_of_any_media_stand_alone_as_in_a_batch(built: tuple[Any, Any, APPOConfig], tmp_path: Path) -> None:
    model, processor, config = built
    builder = PromptBuilder(processor, model.config, config)
    record = training.records()[0]
    picture = training.with_image(record, tmp_path / "a.png")
    both = dataclasses.replace(record, media=record.media + picture.media)
    prompts = [builder(one) for one in (record, both, picture, training.without_media(record))]
    found = prompt_positions(model, collate(prompts, processor.tokenizer.pad_token_id).inputs)
    for row, prompt in enumerate(prompts):
        alone = prompt_positions(model, collate([prompt], 0).inputs)[:, 0]
        assert torch.equal(found[:, row, -len(prompt) :], alone) and (alone[:, -1] == alone.max()).all()


def test_what_hears_is_never_trained(built: tuple[Any, Any, APPOConfig]) -> None:
    model, _, config = built
    plain = prepare_model(model, config)
    (tower,) = audio_towers(plain)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert any(parameter.requires_grad for parameter in plain.base_model.visual.parameters())
    adapted: Any = prepare_model(model, dataclasses.replace(config, lora_rank=2))
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert names and not any("audio_tower" in name or "visual" in name for name in names)


def test_no_response_holds_a_token_of_sound(built: tuple[Any, Any, APPOConfig]) -> None:
    model, processor, _ = built
    tokenizer = processor.tokenizer
    marks = tokenizer.convert_tokens_to_ids(["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|video_pad|>"])
    assert set(marks) <= set(vision_token_ids(model, tokenizer))


def test_an_engine_without_times_is_refused(built: tuple[Any, Any, APPOConfig]) -> None:
    model, processor, config = built
    other = dataclasses.replace(config, engine="vllm-server", vllm_python="python3")
    with pytest.raises(ConfigError, match="`engine`: expected transformers"):
        build_engine(other, model, processor)


def test_a_question_may_not_hold_a_token_of_sound(built: tuple[Any, Any, APPOConfig]) -> None:
    model, processor, config = built
    record = dataclasses.replace(training.records()[0], question="What is <|audio_bos|><|AUDIO|> here?")
    with pytest.raises(DataError, match=r"the model's own token '<\|"):
        PromptBuilder(processor, model.config, config)(record)
