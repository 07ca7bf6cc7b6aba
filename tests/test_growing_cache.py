"""A cache with room for tokens to come, against transformers' DynamicCache; docs/engines.md has the times of each."""

from typing import Any

import pytest
import torch
from rollout_cases import FAMILIES, build, rollout
from transformers import DynamicCache, Qwen2Config, Qwen3_5TextConfig
from transformers.cache_utils import DynamicLayer

from appo.models import growing_cache as growing
from appo.models.growing_cache import GrowingLayer, growing_cache
from appo.models.packed_attention import use_packed_attention
from appo.rollout import model_engine

CONFIG = Qwen2Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)


def appended(cache: Any, tokens: int, rows: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What two layers return for so many new tokens."""
    generator = torch.Generator().manual_seed(seed)
    new = [[torch.randn(rows, 2, tokens, 8, generator=generator) for _ in range(2)] for _ in range(2)]
    return [cache.update(*states, layer) for layer, states in enumerate(new)]


# A prompt first, and none; room for one more token at a time, and for several.
@pytest.mark.parametrize("prompt", [0, 5])
@pytest.mark.parametrize("step", [1, 4])
def test_it_returns_what_a_dynamic_cache_does(prompt: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "STEP", step)
    ours, theirs, longest, rows = growing_cache(CONFIG, prompt + 12), DynamicCache(config=CONFIG), prompt + 12, 3
    earlier = []
    for t in range(12):
        count = prompt if t == 0 and prompt else 1
        found, want = appended(ours, count, rows, t), appended(theirs, count, rows, t)
        earlier.append((found, want))
        assert ours.get_seq_length() == theirs.get_seq_length()
        if t == 6:  # rows leave, one is there twice
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor([2, 0, 2, 1]))
            rows = 4
    for found, want in earlier:  # what was returned is not overwritten by what comes
        assert all(torch.equal(a, b) for pair in zip(found, want, strict=True) for a, b in zip(*pair, strict=True))
    assert all(room.shape[2] <= longest for layer in ours.layers for room in layer.rooms if room is not None)


def test_a_token_is_written_without_a_copy_of_those_before() -> None:
    cache = growing_cache(CONFIG, 1000)
    places = []
    for t in range(growing.STEP + 2):
        places.append([x.data_ptr() for x in appended(cache, 1, 2, t)[0]])
    assert len({tuple(place) for place in places}) == 3  # the first token's own, and two rooms of so many tokens
    assert places[1] == places[growing.STEP]


def test_layers_of_other_kinds_are_those_of_transformers() -> None:
    windows = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    linear = Qwen3_5TextConfig(num_hidden_layers=4)
    for config in (windows, linear):
        plain, found = DynamicCache(config=config).layers, growing_cache(config, 8).layers
        for one, other in zip(plain, found, strict=True):
            assert type(other) is (GrowingLayer if type(one) is DynamicLayer else type(one))
        assert any(type(layer) is GrowingLayer for layer in found) and any(
            type(layer) is not GrowingLayer for layer in found
        )


# Prompts that are kept once, and repeated ones; the most probable tokens, and drawn ones. Rows leave when they end.
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 20.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_responses(family: str, temperature: float, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build(family)
    if shared:
        use_packed_attention(tiny[0])
    monkeypatch.setattr(growing, "STEP", 5)
    ours = rollout(tiny, temperature=temperature, group_size=6, max_new_tokens=40)
    monkeypatch.setattr(model_engine, "growing_cache", lambda config, _: DynamicCache(config=config.get_text_config()))
    theirs = rollout(tiny, temperature=temperature, group_size=6, max_new_tokens=40)
    assert temperature == 0 or {one.finish_reason for one in ours} == {"stop", "length"}
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.ids, other.ids) and one.finish_reason == other.finish_reason
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-6, rtol=1e-6)
