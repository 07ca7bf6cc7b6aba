"""Responses do not depend on how prompts and groups are sampled together, nor on prompts that are kept once."""

import pytest
import torch
from rollout_cases import FAMILIES, as_prompts, build, rollout, scored

from appo.models.packed_attention import use_packed_attention
from appo.models.prompt_cache import PromptCache
from appo.rollout.engine import Sampling
from appo.rollout.model_engine import TransformersRollout, batches
from appo_kernels.testing import peak_extra_bytes


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    return build(request.param)


SAMPLING = Sampling(group_size=8, max_new_tokens=60, temperature=20.0)


@pytest.fixture(scope="module")
def whole(tiny):
    """Groups sampled in one batch, each prompt repeated for each of its responses; some of them end early."""
    model, processor, inputs = tiny
    groups = TransformersRollout(model, processor).generate(as_prompts(inputs), SAMPLING, [1, 2, 3])
    assert sum(completion.finish_reason == "stop" for group in groups for completion in group) > 3, "some end early"
    return groups


def assert_as_whole(whole, tiny, budget):
    """The same responses in the same order, sampled in batches of a budget."""
    model, processor, inputs = tiny
    engine = TransformersRollout(model, processor, batch_tokens=budget)
    found = engine.generate(as_prompts(inputs), SAMPLING, [1, 2, 3])
    for first, second in zip(whole, found, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.ids, b.ids) and a.finish_reason == b.finish_reason
            torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-4)


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


def test_samples_do_not_depend_on_how_they_are_batched(whole, tiny):
    """Split groups, prompts by themselves, and rows that leave when they have ended: the same responses, in order."""
    for budget in (1, 5 * (len(as_prompts(tiny[2])[0]) + SAMPLING.max_new_tokens)):
        assert_as_whole(whole, tiny, budget)


@pytest.fixture
def sharing(tiny):
    """The models as training has them, with packed groups, and so with each prompt kept once while sampling."""
    use_packed_attention(tiny[0])
    yield tiny
    tiny[0].set_attn_implementation("sdpa")


# All in one batch; groups in parts; rows that leave when they have ended are in all of them.
@pytest.mark.parametrize("budget", [262_144, 400, 1])
def test_samples_of_shared_prompts_are_those_of_repeated_ones(whole, sharing, budget):
    assert_as_whole(whole, sharing, budget)


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
