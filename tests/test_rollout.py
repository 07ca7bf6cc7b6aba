"""Sampling against transformers' own generate and against a full forward, on left-padded prompts with videos."""

from functools import partial

import pytest
import torch
from transformers.video_utils import VideoMetadata

from appo.data.prompts import Prompt, collate
from appo.data.records import Record
from appo.models import loaded
from appo.models.loaded import (
    cache_argument,
    disable_checkpointing,
    enable_checkpointing,
    prompt_positions,
    vision_token_ids,
)
from appo.models.packed_attention import use_packed_attention
from appo.models.prompt_cache import PromptCache
from appo.rollout import model_engine
from appo.rollout.engine import Completion, Sampling, checked
from appo.rollout.model_engine import TransformersRollout, batches, draw_token
from appo.tasks.tiny import build_tiny
from appo_kernels.testing import peak_extra_bytes

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


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    model, processor = build_tiny(3, family=request.param)
    with torch.no_grad():  # sharper logits than those of a fresh model: their order must survive rounding
        model.lm_head.weight.mul_(20)
    inputs = prompts(processor, FAMILIES[request.param])
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


# Budgets in tokens of two prompts of 5 and 4 tokens, groups of 3 responses of at most 3: all in one batch; a group a
# batch; a group in parts; less than a row.
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (48, [[(0, 0, 3), (1, 0, 3)]]),
        (47, [[(0, 0, 3)], [(1, 0, 3)]]),
        (16, [[(0, 0, 2)], [(0, 2, 3), (1, 0, 1)], [(1, 1, 3)]]),
        (1, [[(i, j, j + 1)] for i in range(2) for j in range(3)]),
    ],
)
def test_prompts_are_sampled_in_batches_of_tokens(budget, expected):
    found = batches([5, 4], Sampling(group_size=3, max_new_tokens=3), budget)
    assert [[(index, rows.start, rows.stop) for index, rows in batch] for batch in found] == expected


def test_samples_do_not_depend_on_how_they_are_batched(tiny):
    """Split groups, prompts by themselves, and rows that leave when they have ended: the same responses, in order."""
    model, processor, inputs = tiny
    sampling, prompts = Sampling(group_size=8, max_new_tokens=60, temperature=20.0), as_prompts(inputs)
    whole = TransformersRollout(model, processor).generate(prompts, sampling, [1, 2, 3])
    assert sum(completion.finish_reason == "stop" for group in whole for completion in group) > 3, "some end early"
    for budget in (1, 5 * (len(prompts[0]) + 60)):
        parts = TransformersRollout(model, processor, batch_tokens=budget).generate(prompts, sampling, [1, 2, 3])
        for first, second in zip(whole, parts, strict=True):
            for a, b in zip(first, second, strict=True):
                assert torch.equal(a.ids, b.ids) and a.finish_reason == b.finish_reason
                torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-4)


@pytest.fixture
def sharing(tiny):
    """The models as training has them, with packed groups, and so with each prompt kept once while sampling."""
    use_packed_attention(tiny[0])
    yield tiny
    tiny[0].set_attn_implementation("sdpa")


# All in one batch; groups in parts; rows that leave when they have ended are in all of them.
@pytest.mark.parametrize("budget", [262_144, 400, 1])
def test_samples_of_shared_prompts_are_those_of_repeated_ones(tiny, budget, request):
    model, processor, inputs = tiny
    sampling, prompts = Sampling(group_size=8, max_new_tokens=60, temperature=20.0), as_prompts(inputs)
    expected = TransformersRollout(model, processor).generate(prompts, sampling, [1, 2, 3])
    assert sum(completion.finish_reason == "stop" for group in expected for completion in group) > 3, "some end early"
    request.getfixturevalue("sharing")
    found = TransformersRollout(model, processor, batch_tokens=budget).generate(prompts, sampling, [1, 2, 3])
    for first, second in zip(expected, found, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.ids, b.ids) and a.finish_reason == b.finish_reason
            torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-4)


def test_under_autocast_shared_prompts_are_as_good_as_repeated_ones(tiny, request):
    """Distances of log-probabilities to those of a full forward in fp32."""
    model, _, inputs = tiny

    def distance():
        with torch.autocast("cpu", torch.bfloat16):
            found = rollout(tiny, group_size=4, max_new_tokens=20)
        errors = [scored(model, inputs, row // 4, one.ids) - one.logprobs for row, one in enumerate(found)]
        return float(torch.cat(errors).abs().mean())

    repeated = distance()
    request.getfixturevalue("sharing")
    assert distance() < 1.3 * repeated


def test_a_prompt_is_kept_once(sharing, monkeypatch):
    """However large the group: neither its keys nor anything else of its length is made for each response."""
    model, processor, inputs = sharing
    prompt = as_prompts(inputs)[:1]
    caches, made = [], PromptCache.of_prefill
    monkeypatch.setattr(PromptCache, "of_prefill", lambda *a: caches.append(made(*a)) or caches[-1])

    def peak(group_size):
        sampling = Sampling(group_size=group_size, max_new_tokens=3)
        return peak_extra_bytes(lambda: TransformersRollout(model, processor).generate(prompt, sampling, [1]))

    few, many = peak(2), peak(34)
    assert [cache.tokens for cache in caches] == [len(prompt[0])] * 2
    text = model.config.get_text_config()
    heads, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    repeated = 32 * len(prompt[0]) * 2 * heads * width * 4 * text.num_hidden_layers
    assert many - few < repeated / 2, (few, many, repeated)


def test_batches_count_a_shared_prompt_once():
    """Prompts of 5 and 4 tokens, padded to the first, with groups of 3 responses of at most 3."""
    sampling = Sampling(group_size=3, max_new_tokens=3)
    for budget, expected in (
        (28, [[(0, 0, 3), (1, 0, 3)]]),
        (27, [[(0, 0, 3)], [(1, 0, 3)]]),
        (11, [[(0, 0, 2)], [(0, 2, 3)], [(1, 0, 2)], [(1, 2, 3)]]),
        (1, [[(i, j, j + 1)] for i in range(2) for j in range(3)]),
    ):
        found = batches([5, 4], sampling, budget, shared=True)
        assert [[(index, rows.start, rows.stop) for index, rows in batch] for batch in found] == expected


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
