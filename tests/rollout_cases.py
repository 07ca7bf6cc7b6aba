"""Tiny models and left-padded prompts with videos, and responses that are sampled to them."""

import torch
from transformers.video_utils import VideoMetadata

from appo.data.prompts import Prompt
from appo.data.records import Record
from appo.rollout.engine import Sampling, checked
from appo.rollout.model_engine import TransformersRollout
from appo.tasks.tiny import build_tiny

FAMILIES = {"qwen2_5_vl": 28, "qwen3_vl": 32}  # side of a frame in pixels
QUESTIONS = (
    "Which colour is the flash?\nA. red\nB. green\nC. blue\nD. yellow",
    "Which way is the jump?",
    "How many flashes are there in this video?\nA. one\nB. two",
)


def prompts(processor, side):
    """Three prompts of different lengths; the second video has fewer frames."""
    videos = [
        torch.randint(
            0, 256, (frames, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(frames)
        )
        for frames in (16, 8, 12)
    ]
    metadata = [
        VideoMetadata(total_num_frames=len(v), fps=4.0, duration=len(v) / 4, frames_indices=list(range(len(v))))
        for v in videos
    ]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in QUESTIONS
    ]
    kwargs = {"do_sample_frames": False, "do_resize": False, "video_metadata": metadata}
    inputs = processor(text=texts, videos=videos, videos_kwargs=kwargs, padding=True, return_tensors="pt")
    return {name: torch.as_tensor(value) for name, value in inputs.items() if name != "video_metadata"}


def as_prompts(inputs):
    """The rows of a processor's batch as the prompts that a trainer hands over."""
    found = []
    for index in range(len(QUESTIONS)):
        alone = one_prompt(inputs, index)
        vision = {name: value for name, value in alone.items() if "video" in name or name == "second_per_grid_ts"}
        text = alone["input_ids"][0]
        nothing = torch.full(text.shape, -1, dtype=torch.int32)
        found.append(Prompt(RECORD, text, alone["mm_token_type_ids"][0], vision, nothing))
    return found


RECORD = Record(id="0", question="", answer="", kind="free-form")


def build(family):
    """A tiny model, its processor and a padded batch of three prompts."""
    model, processor = build_tiny(3, family=family)
    with torch.no_grad():  # sharper logits than those of a fresh model: their order must survive rounding
        model.lm_head.weight.mul_(20)
    inputs = prompts(processor, FAMILIES[family])
    assert inputs["attention_mask"][1, 0] == 0, "the batch has to be padded"
    return model, processor, inputs


def rollout(tiny, seed=0, only=None, suppress_ids=None, **options):
    """Sampled responses to the three prompts (or to those ``only`` names), as (flat list, padded ids, mask)."""
    model, processor, inputs = tiny
    sampling = Sampling(**({"group_size": 3, "max_new_tokens": 12} | options))
    chosen = as_prompts(inputs) if only is None else [as_prompts(inputs)[index] for index in only]
    seeds = [100 * seed + index for index in only or range(len(chosen))]
    engine = TransformersRollout(model, processor, suppress_ids=suppress_ids)
    groups = checked(engine.generate(chosen, sampling, seeds), engine, chosen, sampling)
    return [completion for group in groups for completion in group]


def scored(model, inputs, index, ids, temperature=1.0):
    """Log-probabilities of the response ``ids`` to one prompt in a full forward."""
    alone, response = one_prompt(inputs, index), ids[None]
    length = alone["input_ids"].shape[1]
    alone["input_ids"] = torch.cat([alone["input_ids"], response], 1)
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    types = alone["mm_token_type_ids"]
    alone["mm_token_type_ids"] = torch.cat([types, torch.zeros(response.shape, dtype=types.dtype)], 1)
    with torch.no_grad():
        logits = model(**alone).logits[:, length - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, response[..., None])[0, :, 0]


def one_prompt(inputs, index):
    """The index-th prompt by itself, without padding."""
    keep = inputs["attention_mask"][index].bool()
    out = {name: inputs[name][index, keep][None] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    patches = inputs["video_grid_thw"].prod(-1).tolist()
    out["pixel_values_videos"] = inputs["pixel_values_videos"].split(patches)[index]
    out["video_grid_thw"] = inputs["video_grid_thw"][index : index + 1]
    if "second_per_grid_ts" in inputs:
        out["second_per_grid_ts"] = inputs["second_per_grid_ts"][index : index + 1]
    return out
