"""Sampling against transformers' own generate and against a full forward, on left-padded prompts with videos."""

from functools import partial

import pytest
import torch
from rollout_cases import FAMILIES, QUESTIONS, as_prompts, build, one_prompt, rollout, scored

from appo.data.prompt_batch import collate
from appo.models import loaded
from appo.models.loaded import (
    cache_argument,
    disable_checkpointing,
    enable_checkpointing,
    prompt_positions,
    vision_token_ids,
)
from appo.rollout import model_engine
from appo.rollout.engine import Completion, Sampling, checked
from appo.rollout.model_engine import TransformersRollout, draw_token


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    return build(request.param)


def test_padding_that_torch_masks_wrongly_is_refused_before_sampling(tiny, monkeypatch):
    """As on CUDA, with a bound between the lengths of the prompts alone and with their responses."""
    longest = tiny[2]["attention_mask"].shape[1]
    monkeypatch.setattr(loaded, "MOST_MASKED_TOKENS", longest + 11)
    monkeypatch.setattr(model_engine, "refuse_dense_mask", partial(loaded.refuse_dense_mask, device_type="cuda"))
    monkeypatch.setattr(model_engine, "cache_argument", lambda model: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=rf"`share_prompt`: .* padded batch of {longest + 12} tokens .* one prompt at"):
        rollout(tiny, max_new_tokens=12)
    for allowed in ({"max_new_tokens": 11}, {"max_new_tokens": 12, "only": [0]}):
        with pytest.raises(pytest.fail.Exception, match="sampled"):
            rollout(tiny, **allowed)


def test_greedy_equals_generate(tiny):
    model, processor, inputs = tiny
    ours = rollout(tiny, temperature=0.0, group_size=2)
    suppressed = vision_token_ids(model, processor.tokenizer)
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=12, suppress_tokens=suppressed)
    theirs = theirs[:, inputs["input_ids"].shape[1] :]
    for index, row in enumerate(theirs):
        for found in ours[2 * index : 2 * index + 2]:
            assert torch.equal(found.ids, row[: len(found.ids)])


# The two names that versions of transformers give the argument.
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_goes_by_the_name_that_the_forward_takes(tiny, name, monkeypatch):
    model = tiny[0]
    expected = rollout(tiny, seed=4)
    installed, forward, caches = cache_argument(model), model.forward, []

    def old(past_key_values=None, **rest):
        caches.append(past_key_values)
        return forward(**{installed: past_key_values}, **rest)

    def new(cache=None, **rest):
        return old(cache, **rest)

    monkeypatch.setattr(model, "forward", old if name == "past_key_values" else new)
    assert cache_argument(model) == name
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(rollout(tiny, seed=4), expected, strict=True))
    assert len(caches) > 1 and all(cache is caches[0] is not None for cache in caches)


def test_a_forward_without_a_cache_is_refused():
    with pytest.raises(ValueError, match=r"`cache` or `past_key_values`, got Linear, which takes input"):
        cache_argument(torch.nn.Linear(2, 2))


# Temperatures away from 1 tell whether logits or log-probabilities are divided.
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_logprobs_equal_a_full_forward(tiny, temperature):
    model, _, inputs = tiny
    done = rollout(tiny, temperature=temperature)
    for row, completion in enumerate(done):
        expected = scored(model, inputs, row // 3, completion.ids, temperature)
        torch.testing.assert_close(completion.logprobs, expected, atol=1e-4, rtol=0)


def test_suppressed_ids_are_never_sampled(tiny):
    model, processor, _ = tiny
    ids = processor.tokenizer.convert_tokens_to_ids(
        ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    assert set(ids) <= set(vision_token_ids(model, processor.tokenizer))
    assert processor.tokenizer.eos_token_id not in vision_token_ids(model, processor.tokenizer)
    favoured = model.lm_head.weight.detach().clone()
    try:
        # Near-uniform logits at a high temperature: without suppression a hundred draws hit these ids.
        with torch.no_grad():
            model.lm_head.weight.copy_(favoured * 1e-3)
        done = torch.cat([completion.ids for completion in rollout(tiny, group_size=32)])
        free = torch.cat([completion.ids for completion in rollout(tiny, group_size=32, suppress_ids=[])])
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(favoured)
    assert not torch.isin(done, torch.tensor(ids)).any()
    assert torch.isin(free, torch.tensor(ids)).any()


def test_responses_end_at_their_end_token(tiny):
    _, processor, _ = tiny
    done = rollout(tiny, group_size=16, temperature=20.0, max_new_tokens=80, seed=2)
    end = processor.tokenizer.eos_token_id
    reasons = {completion.finish_reason for completion in done}
    assert reasons == {"stop", "length"} or reasons == {"stop"}
    for completion in done:
        assert bool(completion.ids[-1] == end) == (completion.finish_reason == "stop")
        assert not (completion.ids[:-1] == end).any()
        assert completion.finish_reason == "stop" or len(completion.ids) == 80


def test_the_seed_decides_the_samples(tiny):
    first, again, other = (rollout(tiny, temperature=2.0, seed=seed) for seed in (7, 7, 8))
    assert all(
        torch.equal(a.ids, b.ids) and torch.equal(a.logprobs, b.logprobs) for a, b in zip(first, again, strict=True)
    )
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(first, other, strict=True))
    assert len({tuple(completion.ids.tolist()) for completion in first}) > 3, "responses of a group differ"


def test_samples_do_not_depend_on_the_batch(tiny):
    """A prompt alone, among others, and with a group of another size: the same responses."""
    together = rollout(tiny, temperature=2.0)
    for index in range(len(QUESTIONS)):
        alone = rollout(tiny, temperature=2.0, only=[index], group_size=2)
        for found, expected in zip(alone, together[3 * index :], strict=False):
            assert torch.equal(found.ids, expected.ids)
            torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def test_tokens_are_drawn_with_their_probabilities():
    """Evenly spread draws hit each token in proportion; one of probability 0 never, not even at the ends."""
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    count = 8000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw_token(probabilities.expand(count, -1), draws)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 4000, 0, 1000, 3000, 0]
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw_token(probabilities.expand(2, -1), ends).tolist() == [1, 4]
    # Probabilities that sum to less than 1, as top-p leaves them, and a tail that fp32 sums would lose.
    tail = torch.cat([torch.tensor([1.0]), torch.full((1000,), 1e-9)])[None]
    assert draw_token(0.25 * tail, torch.tensor([1 - 1e-8], dtype=torch.float64)).item() > 900


def test_top_p_keeps_the_most_probable(tiny):
    greedy, narrow = rollout(tiny, temperature=0.0), rollout(tiny, temperature=1.0, top_p=1e-6)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(greedy, narrow, strict=True))


def test_vision_runs_once_per_prompt(tiny):
    model, _, inputs = tiny
    seen = []
    hook = model.base_model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        rollout(tiny, group_size=5)
    finally:
        hook.remove()
    assert seen == [len(inputs["pixel_values_videos"])]


def test_training_mode_and_checkpointing_are_set_aside(tiny):
    model = tiny[0]
    expected = rollout(tiny, seed=4)
    enable_checkpointing(model)
    model.train()
    try:
        done = rollout(tiny, seed=4)
        assert model.training
    finally:
        disable_checkpointing(model)
        model.eval()
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(done, expected, strict=True))


def test_positions_skip_the_padding(tiny):
    model, _, inputs = tiny
    together = prompt_positions(model, inputs)
    for index in range(len(QUESTIONS)):
        alone = prompt_positions(model, one_prompt(inputs, index))
        assert torch.equal(together[:, index, inputs["attention_mask"][index].bool()], alone[:, 0])


# One at a time: counts below one, a temperature and a share that are none.
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"group_size": 0}, "group_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_settings_that_make_no_sense(options, named):
    with pytest.raises(ValueError, match=f"`{named}`: expected"):
        Sampling(**({"group_size": 2, "max_new_tokens": 4} | options))


def completion(count=2, **changes):
    values = {"ids": torch.arange(count), "logprobs": torch.zeros(count), "finish_reason": "stop"}
    return Completion(**(values | changes))


# Each thing that an engine of one's own may get wrong, named with the engine.
@pytest.mark.parametrize(
    ("found", "named"),
    [
        ([[completion()] * 2], "2 completions for each of 2 prompts"),
        ([[completion()] * 2, [completion()]], "2 completions for each of 2 prompts"),
        ([[completion(9)] * 2] * 2, "`ids`"),
        ([[completion(ids=torch.zeros(2))] * 2] * 2, "`ids`"),
        ([[completion(ids=torch.zeros(1, 2, dtype=torch.int64))] * 2] * 2, "`ids`"),
        ([[completion(logprobs=torch.zeros(3))] * 2] * 2, "`logprobs`"),
        ([[completion(logprobs=torch.zeros(2, dtype=torch.float64))] * 2] * 2, "`logprobs`"),
        ([[completion(finish_reason="abort")] * 2] * 2, "`finish_reason`"),
    ],
)
def test_what_an_engine_returns_is_checked(tiny, found, named):
    engine = TransformersRollout(tiny[0], tiny[1])
    prompts = as_prompts(tiny[2])[:2]
    with pytest.raises(ValueError, match=f"TransformersRollout.*{named}"):
        checked(found, engine, prompts, Sampling(group_size=2, max_new_tokens=4))


def test_collated_prompts_are_padded_as_the_processor_pads(tiny):
    """The rows of this module's batch went through prompts and back."""
    _, processor, inputs = tiny
    again = collate(as_prompts(inputs), processor.tokenizer.pad_token_id).inputs
    for name, value in inputs.items():
        torch.testing.assert_close(again[name], value, check_dtype=False)


def test_logits_that_are_not_finite_are_an_error(tiny):
    model, processor, inputs = tiny
    saved = model.lm_head.weight.detach().clone()
    try:
        with torch.no_grad():
            model.lm_head.weight[3] = float("nan")
        with pytest.raises(RuntimeError, match="logits are not finite"):
            TransformersRollout(model, processor).generate(as_prompts(inputs), Sampling(2, 4), [1, 2, 3])
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(saved)
