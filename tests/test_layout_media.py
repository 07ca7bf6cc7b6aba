"""Prompts without media, with several videos, with images beside them: their frames, and one batch of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import vision_models
from layout_cases import logits_of, plain_logits, settings
from PIL import Image

from appo.data.messages import prompt_messages
from appo.data.prompts import PromptBuilder
from appo.data.records import DataError, Media, Record
from appo.models.layouts import LAYOUTS
from appo.rollout.engine import Sampling
from appo.rollout.model_engine import TransformersRollout
from appo.train.groups import Group, batch_parts, whole_groups
from appo.train.policy import Policy

WIDE, TALL = (56, 112), (84, 42)


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def video(folder: Path, count: int, size: tuple[int, int], seed: int) -> Media:
    """A folder of ``count`` frames."""
    folder.mkdir()
    for index in range(count):
        noise(size, seed + index).save(folder / f"{index}.png")
    return Media("video", folder)


def picture(path: Path, size: tuple[int, int]) -> Media:
    noise(size, 99).save(path)
    return Media("image", path)


def records(folder: Path) -> list[Record]:
    """Of no media, two videos of other sizes, a video among images, an image."""
    first, second = video(folder / "a", 4, WIDE, 0), video(folder / "b", 4, TALL, 40)
    image = picture(folder / "x.png", (70, 56))
    media = [(), (first, second), (image, first, picture(folder / "y.png", TALL)), (image,)]
    return [
        Record(str(index), "which colour?", "A", "multiple choice", ("A. red", "B. blue"), own, meta={"index": index})
        for index, own in enumerate(media)
    ]


def answered(builder: PromptBuilder, record: Record) -> Group:
    """Two responses, of three tokens and of one."""
    ids = torch.randint(20, 60, (2, 3), generator=torch.Generator().manual_seed(int(record.id)))
    mask, nothing = torch.tensor([[True] * 3, [True, False, False]]), torch.zeros(2)
    return Group(builder(record), ids, mask, torch.zeros(2, 3), mask[:, -1], ["", ""], nothing, nothing, {})


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_media_of_every_kind_in_one_batch(model_type: str, tmp_path: Path) -> None:
    layout = LAYOUTS[model_type]
    model, processor = vision_models.build(model_type)
    builder = PromptBuilder(
        processor, model.config, settings(processor, tmp_path, layout, max_pixels=42 * 42, max_frames=4)
    )
    chosen = [record for record in records(tmp_path) if layout.mixes_media or record.id != "2"]
    groups = [answered(builder, record) for record in chosen]
    steps = 4 // builder.sizes.merged
    for group in groups:
        prompt, videos = group.prompt, [media for media in group.prompt.record.media if media.kind == "video"]
        ids = prompt.frame_ids
        assert prompt.num_frames == steps * len(videos) == len(prompt.frame_times)
        counts = torch.bincount(ids[ids >= 0], minlength=prompt.num_frames).unflatten(0, (-1, steps))
        assert (counts == counts[:, :1]).all() and (counts > 0).all()  # frames of a video are of one size
        assert (ids[ids >= 0].diff() >= 0).all()
        if prompt.record.media and prompt.record.media[0].kind == "image":
            first = int((prompt.input_ids == model.config.image_token_id).nonzero()[0])
            assert ids[first] == -1, "an image is no frame"
    alone = [plain_logits(model, group, row, processor, layout) for group in groups for row in range(2)]
    batch = batch_parts(whole_groups(groups), processor.tokenizer.pad_token_id, "cpu")
    for share in ("on", "off") if layout.shares_prompt else ("off",):
        with torch.no_grad():
            policy = Policy(model, share)
            logits = policy(batch, logits_of(policy))
        for found, mask, expected in zip(logits, batch.mask, alone, strict=True):
            torch.testing.assert_close(found[mask], expected, rtol=1e-4, atol=3e-5)
    sampled = TransformersRollout(model, processor).generate(
        [group.prompt for group in groups], Sampling(1, 2, temperature=0.0), [0] * len(groups)
    )
    for (completion,), expected in zip(sampled, alone[::2], strict=True):
        logprob = expected[0].log_softmax(-1)[completion.ids[0]]
        torch.testing.assert_close(completion.logprobs[0], logprob, rtol=1e-4, atol=1e-4)


def test_images_beside_videos_are_refused_where_the_model_cannot(tmp_path: Path) -> None:
    layout = LAYOUTS["glm46v"]
    model, processor = vision_models.build("glm46v")
    builder = PromptBuilder(processor, model.config, settings(processor, tmp_path, layout))
    with pytest.raises(DataError, match=r"GLM-4.6V of transformers takes images or videos in a prompt, not both"):
        builder(records(tmp_path)[2])


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_videos_of_several_lengths(model_type: str, tmp_path: Path) -> None:
    """A prompt of two videos is what stands of each in a prompt of its own, in tokens, pixels and frames."""
    layout = LAYOUTS[model_type]
    model, processor = vision_models.build(model_type)
    builder = PromptBuilder(processor, model.config, settings(processor, tmp_path, layout, max_frames=8))
    media = [video(tmp_path / "a", 2, WIDE, 0), video(tmp_path / "b", 6, TALL, 9), video(tmp_path / "c", 4, WIDE, 70)]
    question = Record("q", "which?", "A", "free-form")
    together = builder(replace(question, media=tuple(media)))
    alone = [builder(replace(question, id=str(index), media=(one,))) for index, one in enumerate(media)]
    assert together.num_frames == sum(prompt.num_frames for prompt in alone) == 12 // builder.sizes.merged
    counts = torch.cat([torch.bincount(prompt.frame_ids[prompt.frame_ids >= 0]) for prompt in alone])
    assert torch.equal(torch.bincount(together.frame_ids[together.frame_ids >= 0]), counts)
    for name, value in together.vision.items():
        assert torch.equal(value, torch.cat([prompt.vision[name] for prompt in alone])), name
    if model_type == "smolvlm":  # whose text in front of a video counts the frames of the longest
        return
    plain = builder(replace(question, id="plain", media=())).input_ids.tolist()
    whole = [prompt.input_ids.tolist() for prompt in alone]
    begin = next(place for place, token in enumerate(plain) if token != whole[0][place])
    rest = len(plain) - begin
    assert all(ids[:begin] == plain[:begin] and ids[-rest:] == plain[begin:] for ids in whole)
    assert together.input_ids.tolist() == plain[:begin] + [i for ids in whole for i in ids[begin:-rest]] + plain[begin:]


# Those whose tokenizer puts a token in front of all.
@pytest.mark.parametrize("model_type", ["gemma3", "gemma4"])
def test_the_first_token_stands_once(model_type: str, tmp_path: Path) -> None:
    """The template writes it, and the tokenizer would again: transformers' own way of asking is the reference."""
    layout = LAYOUTS[model_type]
    model, processor = vision_models.build(model_type)
    builder = PromptBuilder(processor, model.config, settings(processor, tmp_path, layout))
    plain, *others = (builder(record) for record in records(tmp_path))
    begin = processor.tokenizer.bos_token_id
    assert all(int((prompt.input_ids == begin).sum()) == 1 for prompt in (plain, *others))
    asked = prompt_messages(plain.record, instructions=False)
    own = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert torch.as_tensor(own["input_ids"]).flatten().tolist() == plain.input_ids.tolist()
