"""Recording in other decoders and under other masks: packing, windows, shared prompts, flash attention, hybrids."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3_5TextConfig,
)
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from appo import record_frame_mass
from appo.recording.hooks import _TAPS, NAME

S = 40


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not _TAPS and NAME not in ALL_ATTENTION_FUNCTIONS


def tokens(batch: int, length: int = S, seed: int = 0) -> Tensor:
    return torch.randint(0, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


def frames(batch: int, length: int = S) -> Tensor:
    """(B, S): frames of 5, 1, 7 and 3 keys with gaps; another arrangement in every sequence; frame 2 is empty."""
    ids = torch.full((length,), -1)
    ids[2:7], ids[9], ids[10:17], ids[20:23] = 0, 1, 3, 4
    return torch.stack([ids.roll(3 * i) for i in range(batch)])


def reference(attention_BHRS: Any, ids: Tensor) -> Tensor:
    """(B, S, F): sum over the keys of a frame, mean over heads and the given layers."""
    one_hot = (ids[:, :, None] == torch.arange(5)).double()
    return torch.stack([a.double().mean(1) @ one_hot for a in attention_BHRS]).mean(0)


def record(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """(B, S, F) summed mass of the last three layers, all rows; the logits must not change."""
    with torch.no_grad():
        before = model(**inputs).logits
        with record_frame_mass(model, ids, rows=slice(None), reduction="sum") as recorder:
            assert torch.equal(model(**inputs).logits, before)
    return recorder.mass


def eager(model: Any, **inputs: Any) -> tuple[Tensor, ...]:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


def test_decoder_for_text_with_padding_on_both_sides() -> None:
    model, ids, mask = models.qwen2(), frames(2), torch.ones(2, S).long()
    mask[0, :6], mask[1, 33:] = 0, 0
    inputs = {"input_ids": tokens(2), "attention_mask": mask}
    mass = record(model, ids, **inputs)
    want = reference(eager(model, **inputs)[-3:], ids)
    models.assert_mass_close(mask[..., None] * mass, mask[..., None] * want)
    assert (mass[:, :, 2] == 0).all()


# Two that get a dense mask: boolean, and additive.
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_sliding_window_layers(implementation: str) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = models.qwen2(use_sliding_window=True, sliding_window=8, layer_types=kinds)
    model.set_attn_implementation(implementation)
    inputs, ids = {"input_ids": tokens(2), "attention_mask": torch.ones(2, S).long()}, frames(2)
    inputs["attention_mask"][1, :7] = 0
    mass = record(model, ids, **inputs)
    attentions = eager(model, **inputs)
    assert (attentions[-1][0, :, -1, : S - 8] == 0).all() and (attentions[-2][0, :, -1, : S - 8] > 0).any()
    valid = inputs["attention_mask"].bool()
    models.assert_mass_close(mass[valid], reference(attentions[-3:], ids)[valid])


def packed_alone(model: Any, ids: Tensor, input_ids: Tensor, cuts: list[int]) -> Tensor:
    """(1, S, F): each packed sequence by itself, through eager weights."""
    parts = []
    for start, stop in pairwise(cuts):
        part = eager(model, input_ids=input_ids[:, start:stop])
        parts.append(reference(part[-3:], ids[:, start:stop]))
    return torch.cat(parts, 1)


# Two that get a dense mask: boolean, and additive.
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_sequences_see_only_themselves(implementation: str) -> None:
    model, ids, cuts = models.qwen2(), frames(1), [0, 12, 13, S]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)])[None]
    model.set_attn_implementation(implementation)
    mass = record(model, ids, input_ids=tokens(1), position_ids=positions, use_cache=False)
    models.assert_mass_close(mass, packed_alone(model, ids, tokens(1), cuts))


def test_packed_video_model() -> None:
    """Four rows of position ids, the first for text: how packed sequences are given to Qwen's video models."""
    model, ids, cuts = models.qwen2_5_vl().model, frames(1), [0, 15, S]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)])
    mass = record(model, ids, input_ids=tokens(1), position_ids=positions.expand(4, 1, -1), use_cache=False)
    models.assert_mass_close(mass, packed_alone(model, ids, tokens(1), cuts))


def shared_prompt_mask(prompt: int, response: int) -> Tensor:
    """(1, 1, S, S) bool: two responses behind one prompt, neither of which sees the other."""
    length = prompt + 2 * response
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[prompt + response :, prompt : prompt + response] = False
    return mask[None, None]


# Two that get a dense mask: boolean, and additive.
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_group_behind_a_shared_prompt(implementation: str) -> None:
    prompt, response = 24, 8
    model, ids, input_ids = models.qwen2(), frames(1), tokens(1)
    model.set_attn_implementation(implementation)
    mask = shared_prompt_mask(prompt, response)
    positions = torch.cat([torch.arange(prompt + response), prompt + torch.arange(response)])[None]
    given = (
        mask if implementation == "sdpa" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    )
    mass = record(model, ids, input_ids=input_ids, attention_mask=given, position_ids=positions)
    for start in (prompt, prompt + response):
        keep = torch.cat([torch.arange(prompt), torch.arange(start, start + response)])
        alone = reference(eager(model, input_ids=input_ids[:, keep])[-3:], ids[:, keep])
        models.assert_mass_close(mass[:, start : start + response], alone[:, prompt:])


# Two that get a dense mask: boolean, and additive.
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_that_are_no_intervals_are_refused(implementation: str) -> None:
    model = models.qwen2()
    model.set_attn_implementation(implementation)
    mask = shared_prompt_mask(24, 8)
    mask[..., 34, 3] = False  # of a row that sees the prompt and its own response: three runs of keys
    given = mask if implementation == "sdpa" else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    with (
        pytest.raises(ValueError, match=r"`attention_mask`.*more runs in the row of position 34 of sequence 0"),
        record_frame_mass(model, frames(1), rows=slice(33, 36)),
        torch.no_grad(),
    ):
        model(input_ids=tokens(1), attention_mask=given)
    # Rows that are not recorded may see what they like.
    with record_frame_mass(model, frames(1), rows=slice(28, 34)), torch.no_grad():
        model(input_ids=tokens(1), attention_mask=given)


class Flash:
    """Stands in for flash attention, which needs a GPU: takes the same arguments, and keeps the weights it computed."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []  # (B, Hq, S, S) of each layer of the last forward
        self.names: set[str] = set()

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        self.names.add(module.config._attn_implementation)
        length = query.shape[2]
        index = torch.arange(length)
        seen = index <= index[:, None]
        if options.get("sliding_window"):
            seen &= index > index[:, None] - options["sliding_window"]
        seen = seen.expand(len(query), -1, -1).clone()
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), length)
            seen &= attention_mask.bool()[:, None] & attention_mask.bool()[:, :, None]
        elif len(query) == 1:
            start = options["position_ids"][0].eq(0).cumsum(0)
            seen &= start == start[:, None]
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * options["scaling"]
        probabilities = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num()
        if module.layer_idx == 0:
            self.weights.clear()
        self.weights.append(probabilities.detach())
        return (probabilities @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash() -> Iterator[Flash]:
    function = Flash()
    AttentionInterface.register("test_flash", function)
    AttentionMaskInterface.register("test_flash", flash_attention_mask)
    yield function
    del AttentionInterface._global_mapping["test_flash"]
    del AttentionMaskInterface._global_mapping["test_flash"]


# What flash attention is told by arguments instead of a mask: nothing, padding, packing, a window, and two at once.
@pytest.mark.parametrize("form", ["plain", "padded", "packed", "window", "padded window"])
def test_flash_attention(flash: Flash, form: str) -> None:
    options = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2} if "window" in form else {}
    model = models.qwen2(**options)
    model.config._attn_implementation = "test_flash"
    batch = 1 if form == "packed" else 2
    inputs: dict[str, Any] = {"input_ids": tokens(batch), "use_cache": False}
    if "padded" in form:
        inputs["attention_mask"] = torch.ones(2, S).long()
        inputs["attention_mask"][0, :9] = inputs["attention_mask"][1, -4:] = 0
    if form == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(18), torch.arange(S - 18)])[None]
    mass = record(model, frames(batch), **inputs)
    models.assert_mass_close(mass, reference(flash.weights[-3:], frames(batch)))
    assert flash.names == {"test_flash"}  # the tapped layers, too, show it the model's own config
    if "window" in form:
        assert (flash.weights[-1][1, :, 30, :23] == 0).all() and (flash.weights[0][1, :, 30, :23] > 0).any()


def test_hybrid_decoder_counts_only_layers_with_attention() -> None:
    config = Qwen3_5TextConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 3,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(config).eval()
    ids = frames(2)
    assert record_frame_mass(model, ids, rows=slice(1), layers=2).layers == [3, 5]
    mass = record(model, ids, input_ids=tokens(2))
    attentions = [a for a in eager(model, input_ids=tokens(2)) if a is not None]
    assert len(attentions) == 3
    models.assert_mass_close(mass, reference(attentions, ids))
    with pytest.raises(ValueError, match=r"`layers`: expected 1 to 3, or a list out of \[1, 3, 5\], got 4"):
        record_frame_mass(model, ids, rows=slice(1), layers=4)
    with pytest.raises(ValueError, match=r"out of \[1, 3, 5\], got \[4\]"):
        record_frame_mass(model, ids, rows=slice(1), layers=[4])
    config.layer_types = ["linear_attention"] * 6
    without = Qwen3_5ForCausalLM(config)
    with pytest.raises(ValueError, match=r"`model`: expected decoder layers that attend.*Linear-attention layers"):
        record_frame_mass(without, ids, rows=slice(1))


def test_soft_caps_and_sinks_are_refused() -> None:
    size = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "eager"}
    capped = Gemma2ForCausalLM(Gemma2Config(**size, **heads)).eval()
    sinks = GptOssForCausalLM(GptOssConfig(**size, **heads, num_local_experts=2, num_experts_per_tok=1)).eval()
    for model, name in ((capped, "softcap"), (sinks, "s_aux")):
        with (
            pytest.raises(ValueError, match=f"`layers`: expected attention without `{name}`"),
            record_frame_mass(model, frames(1), rows=slice(None), layers=2),
            torch.no_grad(),
        ):
            model(input_ids=tokens(1))


def test_layer_that_runs_twice_counts_twice() -> None:
    model, ids = models.qwen2(), frames(2)
    model.model.layers[3] = model.model.layers[2]
    inputs = {"input_ids": tokens(2), "use_cache": False}
    models.assert_mass_close(record(model, ids, **inputs), reference(eager(model, **inputs), ids))  # layers 0, 1, 2, 2


def test_batches_without_frames() -> None:
    model = models.qwen2()
    with torch.no_grad(), record_frame_mass(model, torch.full((2, S), -1), rows=slice(-3, None)) as recorder:
        model(input_ids=tokens(2))
    assert recorder.mass.shape == (2, 3, 0)


def test_implementation_set_while_recording() -> None:
    model, ids = models.qwen2(), frames(2)
    with torch.no_grad(), record_frame_mass(model, ids, rows=slice(None), reduction="sum") as recorder:
        attentions = eager(model, input_ids=tokens(2))
        models.assert_mass_close(recorder.mass, reference(attentions[-3:], ids), 1e-6)
    assert all(layer.self_attn.config._attn_implementation == "eager" for layer in model.model.layers)


@pytest.mark.slow
def test_compiled_model() -> None:
    model, ids = models.qwen2(), frames(2)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), record_frame_mass(compiled, ids, rows=slice(None), reduction="sum") as recorder:
        compiled(input_ids=tokens(2))
    models.assert_mass_close(recorder.mass, reference(eager(model, input_ids=tokens(2))[-3:], ids))
