"""Sampling against transformers' own generate and against a full forward, on left-padded prompts with videos."""

import pytest
import torch
from transformers.video_utils import VideoMetadata

from appo.models.loaded import (
    cache_argument,
    disable_checkpointing,
    enable_checkpointing,
    prompt_positions,
    vision_token_ids,
)
from appo.rollout.engine import TransformersRollout
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


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    model, processor = build_tiny(3, family=request.param)
    with torch.no_grad():  # sharper logits than those of a fresh model: their order must survive rounding
        model.lm_head.weight.mul_(20)
    inputs = prompts(processor, FAMILIES[request.param])
    assert inputs["attention_mask"][1, 0] == 0, "the batch has to be padded"
    return model, processor, inputs


def rollout(tiny, **options):
    options = {"group_size": 3, "max_new_tokens": 12, **options}
    return TransformersRollout(tiny[0], tiny[1], **options)


def test_greedy_equals_generate(tiny):
    model, processor, inputs = tiny
    ours = rollout(tiny, temperature=0.0, group_size=2).generate(inputs, torch.Generator())
    suppressed = vision_token_ids(model, processor.tokenizer)
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=12, suppress_tokens=suppressed)
    theirs = theirs[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(ours.ids[0::2, : theirs.shape[1]], theirs)
    assert torch.equal(ours.ids[0::2], ours.ids[1::2])


# The two names that versions of transformers give the argument.
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_goes_by_the_name_that_the_forward_takes(tiny, name, monkeypatch):
    model, _, inputs = tiny
    expected = rollout(tiny).generate(inputs, torch.Generator().manual_seed(4))
    installed, forward, caches = cache_argument(model), model.forward, []

    def old(past_key_values=None, **rest):
        caches.append(past_key_values)
        return forward(**{installed: past_key_values}, **rest)

    def new(cache=None, **rest):
        return old(cache, **rest)

    monkeypatch.setattr(model, "forward", old if name == "past_key_values" else new)
    assert cache_argument(model) == name
    assert torch.equal(rollout(tiny).generate(inputs, torch.Generator().manual_seed(4)).ids, expected.ids)
    assert len(caches) > 1 and all(cache is caches[0] is not None for cache in caches)


def test_a_forward_without_a_cache_is_refused():
    with pytest.raises(ValueError, match=r"`cache` or `past_key_values`, got Linear, which takes input"):
        cache_argument(torch.nn.Linear(2, 2))


# Temperatures away from 1 tell whether logits or log-probabilities are divided.
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_logprobs_equal_a_full_forward(tiny, temperature):
    model, _, inputs = tiny
    done = rollout(tiny, temperature=temperature).generate(inputs, torch.Generator().manual_seed(5))
    for prompt in range(len(QUESTIONS)):
        for row in range(prompt * 3, prompt * 3 + 3):
            alone = one_prompt(inputs, prompt)
            response = done.ids[row, done.mask[row]][None]
            length = alone["input_ids"].shape[1]
            alone["input_ids"] = torch.cat([alone["input_ids"], response], 1)
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            types = alone["mm_token_type_ids"]
            alone["mm_token_type_ids"] = torch.cat([types, torch.zeros(response.shape, dtype=types.dtype)], 1)
            with torch.no_grad():
                logits = model(**alone).logits[:, length - 1 : -1]
            expected = (logits / temperature).log_softmax(-1).gather(-1, response[..., None])[0, :, 0]
            torch.testing.assert_close(done.logprobs[row, done.mask[row]], expected, atol=1e-4, rtol=0)
    assert (done.logprobs[~done.mask] == 0).all()


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


def test_suppressed_ids_are_never_sampled(tiny):
    model, processor, inputs = tiny
    ids = processor.tokenizer.convert_tokens_to_ids(
        ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    assert set(ids) <= set(vision_token_ids(model, processor.tokenizer))
    assert processor.tokenizer.eos_token_id not in vision_token_ids(model, processor.tokenizer)
    favoured = model.lm_head.weight.detach().clone()
    hidden = torch.Generator().manual_seed(1)
    try:
        # Near-uniform logits at a high temperature: without suppression a hundred draws hit these ids.
        with torch.no_grad():
            model.lm_head.weight.copy_(favoured * 1e-3)
        done = rollout(tiny, group_size=32).generate(inputs, hidden)
        free = rollout(tiny, group_size=32, suppress_ids=[]).generate(inputs, torch.Generator().manual_seed(1))
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(favoured)
    assert not torch.isin(done.ids[done.mask], torch.tensor(ids)).any()
    assert torch.isin(free.ids[free.mask], torch.tensor(ids)).any()


def test_responses_end_at_their_end_token(tiny):
    _, processor, inputs = tiny
    rollouts = rollout(tiny, group_size=16, temperature=20.0, max_new_tokens=80)
    done = rollouts.generate(inputs, torch.Generator().manual_seed(2))
    end = processor.tokenizer.eos_token_id
    assert done.finished.any()
    for ids, mask, finished in zip(done.ids, done.mask, done.finished, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        assert bool(ids[length - 1] == end) == bool(finished)
        assert not (ids[: length - 1] == end).any()
        assert (ids[length:] == processor.tokenizer.pad_token_id).all()
        assert finished or length == done.ids.shape[1]


def test_the_generator_decides_the_samples(tiny):
    sampler = rollout(tiny, temperature=2.0)
    first, again, other = (sampler.generate(tiny[2], torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.logprobs, again.logprobs)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


def test_top_p_keeps_the_most_probable(tiny):
    greedy = rollout(tiny, temperature=0.0).generate(tiny[2], torch.Generator())
    narrow = rollout(tiny, temperature=1.0, top_p=1e-6).generate(tiny[2], torch.Generator().manual_seed(0))
    assert torch.equal(greedy.ids, narrow.ids)


def test_vision_runs_once_per_prompt(tiny):
    model, _, inputs = tiny
    seen = []
    hook = model.base_model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        rollout(tiny, group_size=5).generate(inputs, torch.Generator().manual_seed(0))
    finally:
        hook.remove()
    assert seen == [len(inputs["pixel_values_videos"])]


def test_training_mode_and_checkpointing_are_set_aside(tiny):
    model, _, inputs = tiny
    expected = rollout(tiny).generate(inputs, torch.Generator().manual_seed(4))
    enable_checkpointing(model)
    model.train()
    try:
        done = rollout(tiny).generate(inputs, torch.Generator().manual_seed(4))
        assert model.training
    finally:
        disable_checkpointing(model)
        model.eval()
    assert torch.equal(done.ids, expected.ids)


def test_positions_skip_the_padding(tiny):
    model, _, inputs = tiny
    together = prompt_positions(model, inputs)
    for index in range(len(QUESTIONS)):
        alone = prompt_positions(model, one_prompt(inputs, index))
        assert torch.equal(together[:, index, inputs["attention_mask"][index].bool()], alone[:, 0])


@pytest.mark.parametrize(
    ("options", "named"),
    [({"group_size": 0}, "group_size"), ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p")],
)
def test_settings_that_make_no_sense(tiny, options, named):
    with pytest.raises(ValueError, match=f"`{named}`: expected"):
        rollout(tiny, **options)


def test_right_padding_is_refused(tiny):
    inputs = dict(tiny[2])
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="padded on the left"):
        rollout(tiny).generate(inputs, torch.Generator())
