"""Frame attention mass recorded in tiny models, against the weights that eager attention returns."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from appo import frame_ids, record_frame_mass
from appo.models.loaded import cache_argument, disable_checkpointing, enable_checkpointing
from appo.recording.arguments import response_rows
from appo.recording.frame_ids import FrameIds
from appo.recording.hooks import _TAPS, NAME
from appo_kernels.testing import assert_as_good_as

RESPONSE = 9
ROWS = slice(-1 - RESPONSE, -1)  # of a response of RESPONSE tokens at the end


class Case:
    """A tiny video model, a left-padded batch with 3 and 5 frames of different sizes, and eager attention's weights."""

    def __init__(self, build: Callable[..., models.VideoModel]) -> None:
        self.tiny = build()
        self.model = self.tiny.model
        videos = [models.random_video(3, 28, 28), models.random_video(5, 28, 42, seed=1)]
        self.inputs = self.tiny.inputs(
            videos, ["What happens?", "And what happens in this longer question?"], "B " * RESPONSE
        )
        self.frames = frame_ids(
            self.inputs["input_ids"], self.tiny.config, video_grid_thw=self.inputs["video_grid_thw"]
        )
        self.valid = self.inputs["attention_mask"].bool()
        self.attentions = weights(self.model, self.inputs)

    def logits(self) -> Tensor:
        return self.model(**self.inputs).logits


@pytest.fixture(scope="module", params=[models.qwen2_5_vl, models.qwen3_vl], ids=["qwen2_5_vl", "qwen3_vl"])
def built(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture
def case(built: Case) -> Iterator[Case]:
    """Every test gets the model with sdpa attention in eval mode, and must leave nothing on it."""
    built.model.set_attn_implementation("sdpa")
    built.model.eval().zero_grad()
    yield built
    disable_checkpointing(built.model)
    assert_nothing_left(built.model)


def assert_nothing_left(model: Any) -> None:
    decoder = model.get_decoder()
    assert not _TAPS
    assert NAME not in ALL_ATTENTION_FUNCTIONS
    assert not decoder._forward_hooks and not decoder._forward_pre_hooks
    assert all(layer.self_attn.config is decoder.config for layer in decoder.layers)


def weights(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """(B, Hq, S, S) per layer, from eager attention."""
    before = model.get_decoder().config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return attentions


def expected(attentions: Any, ids: Tensor, layers: list[int], reduction: str = "mean") -> Tensor:
    """(B, S, F), docs/method.md section 3 written out."""
    one_hot = (ids[:, :, None] == torch.arange(int(ids.max()) + 1)).double()  # (B, S, F)
    if reduction == "mean":
        one_hot = one_hot / one_hot.sum(1, keepdim=True).clamp_min(1)
    return torch.stack([attentions[layer].double().mean(1) @ one_hot for layer in layers]).mean(0)


# Both sides of every choice: one layer, some and all; the default last three; rows by slice and one by one.
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("layers", "tapped", "reduction"),
    [
        (3, [1, 2, 3], "mean"),
        (1, [3], "sum"),
        (4, [0, 1, 2, 3], "sum"),
        ([2, 0], [0, 2], "mean"),
        ([-1, 1], [1, 3], "mean"),
    ],
)
def test_mass_is_that_of_eager_weights(
    case: Case, implementation: str, layers: Any, tapped: list[int], reduction: str
) -> None:
    case.model.set_attn_implementation(implementation)
    with torch.no_grad():
        before = case.logits()
        with record_frame_mass(case.model, case.frames, rows=ROWS, layers=layers, reduction=reduction) as recorder:
            during = case.logits()
        after = case.logits()
    assert recorder.layers == tapped
    assert torch.equal(before, during) and torch.equal(before, after)
    assert case.model.config._attn_implementation == implementation
    assert case.model.config.text_config._attn_implementation == implementation
    assert recorder.mass.shape == (2, RESPONSE, 5)
    models.assert_mass_close(recorder.mass, expected(case.attentions, case.frames.ids, tapped, reduction)[:, ROWS])
    assert (recorder.mass[0, :, 3:] == 0).all() and (recorder.mass[1] > 0).all()


def test_any_rows(case: Case) -> None:
    length = case.valid.shape[1]
    rows = torch.randint(0, length, (2, 17), generator=torch.Generator().manual_seed(0))
    want = expected(case.attentions, case.frames.ids, [1, 2, 3])
    with torch.no_grad(), record_frame_mass(case.model, case.frames, rows=slice(None)) as recorder:
        case.logits()
    models.assert_mass_close(recorder.mass[case.valid], want[case.valid])
    assert (recorder.mass[~case.valid] == 0).all()  # padding sees no key
    with torch.no_grad(), record_frame_mass(case.model, case.frames, rows=rows) as some:
        case.logits()
    batch = torch.arange(2)[:, None]
    models.assert_mass_close(some.mass, recorder.mass[batch, rows].double(), 1e-6)


def test_all_keys_together_have_all_the_mass(case: Case) -> None:
    everything = case.frames.ids.clone()
    everything[everything < 0] = 5  # text and padding as one more frame
    with torch.no_grad(), record_frame_mass(case.model, everything, rows=ROWS, reduction="sum") as recorder:
        case.logits()
    torch.testing.assert_close(recorder.mass.sum(-1), torch.ones(2, RESPONSE), rtol=0, atol=1e-5)


def test_bitwise_equal_on_a_second_run_and_anew_for_each_forward(case: Case) -> None:
    with torch.no_grad(), record_frame_mass(case.model, case.frames, rows=ROWS) as recorder:
        case.logits()
        first = recorder.mass
        other = {**case.inputs, "input_ids": case.inputs["input_ids"].clone()}
        other["input_ids"][:, -5:] += 1
        case.model(**other)
        assert not torch.equal(recorder.mass, first)
        case.logits()
    assert torch.equal(recorder.mass, first)
    with torch.no_grad(), recorder:  # the same recorder once more
        with pytest.raises(RuntimeError, match=r"got none through \[1, 2, 3\]. Call the model"):
            _ = recorder.mass
        with recorder:
            case.logits()
        assert NAME in ALL_ATTENTION_FUNCTIONS
    assert torch.equal(recorder.mass, first)


# Reentrant checkpointing runs the first forward without gradients, the other kind with; both run layers again later.
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])  # or in the context of another recorder
def test_gradient_checkpointing(case: Case, reentrant: bool, backward_inside: bool) -> None:
    case.model.train()
    labels = case.inputs["input_ids"]
    case.model(**case.inputs, labels=labels).loss.backward()
    plain = {
        name: parameter.grad.clone() for name, parameter in case.model.named_parameters() if parameter.grad is not None
    }
    case.model.zero_grad()

    enable_checkpointing(case.model, reentrant=reentrant)
    calls = count_calls(case.model)
    with record_frame_mass(case.model, case.frames, rows=ROWS) as recorder:
        loss = case.model(**case.inputs, labels=labels).loss
        recorded = recorder.mass
        if backward_inside:
            loss.backward()
    if not backward_inside:
        with record_frame_mass(case.model, case.frames, rows=ROWS) as later:
            loss.backward()
        with pytest.raises(RuntimeError, match="got none through"):  # a recomputation is no forward
            _ = later.mass
    assert calls() == 2 * models.LAYERS  # the layers did run twice
    assert torch.equal(recorder.mass, recorded)
    models.assert_mass_close(recorded, expected(case.attentions, case.frames.ids, [1, 2, 3])[:, ROWS])
    for name, gradient in plain.items():
        torch.testing.assert_close(case.model.get_parameter(name).grad, gradient, msg=name)


def count_calls(model: Any) -> Callable[[], int]:
    """A function that says how often attention layers have run, and stops counting."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1

    handles = [layer.self_attn.register_forward_hook(hook) for layer in model.get_decoder().layers]

    def stop() -> int:
        for handle in handles:
            handle.remove()
        return count

    return stop


def test_only_tapped_layers_are_touched(case: Case) -> None:
    attention = [layer.self_attn for layer in case.model.get_decoder().layers]
    with record_frame_mass(case.model, case.frames, rows=ROWS, layers=[2]):
        touched = [module.config._attn_implementation for module in attention]
        assert touched == ["sdpa", "sdpa", NAME, "sdpa"]
        assert case.model.get_decoder().config._attn_implementation == "sdpa"


def test_two_recorders_leave_in_any_order(case: Case) -> None:
    outer = record_frame_mass(case.model, case.frames, rows=ROWS)
    inner = record_frame_mass(case.model, case.frames, rows=slice(-2, -1), layers=[0, 3], reduction="sum")
    with torch.no_grad(), ExitStack() as first, ExitStack() as second:
        first.enter_context(outer)
        second.enter_context(inner)
        case.logits()
        first.close()
        models.assert_mass_close(inner.mass, expected(case.attentions, case.frames.ids, [0, 3], "sum")[:, -2:-1])
        recorded = outer.mass
        case.inputs["input_ids"][:, -1] ^= 1
        case.logits()  # for the inner one only
        case.inputs["input_ids"][:, -1] ^= 1
    assert torch.equal(outer.mass, recorded)
    models.assert_mass_close(outer.mass, expected(case.attentions, case.frames.ids, [1, 2, 3])[:, ROWS])


def test_after_an_exception_nothing_is_left(case: Case) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    for place in (case.model.lm_head, case.model.get_decoder().layers[2]):
        handle = place.register_forward_pre_hook(fail)
        with (
            pytest.raises(OSError, match="disk full"),
            record_frame_mass(case.model, case.frames, rows=ROWS) as recorder,
        ):
            case.logits()
        handle.remove()
        assert_nothing_left(case.model)
    with pytest.raises(RuntimeError, match=r"got none through \[2, 3\]"):
        _ = recorder.mass


def test_recomputation_after_a_failed_forward_is_not_taken_for_it(case: Case) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    case.model.train()
    enable_checkpointing(case.model)
    with record_frame_mass(case.model, case.frames, rows=ROWS) as recorder:
        loss = case.logits().sum()
        handle = case.model.get_decoder().layers[1].register_forward_pre_hook(fail)
        with pytest.raises(OSError, match="disk full"):
            case.logits()
        handle.remove()
        loss.backward()
        with pytest.raises(RuntimeError, match=r"got none through \[1, 2, 3\]"):
            _ = recorder.mass


class Wrapper(nn.Module):
    """What accelerate and DistributedDataParallel look like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_inside_wrappers_and_lora(case: Case) -> None:
    from peft import LoraConfig, get_peft_model

    tiny = models.qwen2_5_vl() if case.tiny.name == "qwen2_5_vl" else models.qwen3_vl()
    lora = get_peft_model(tiny.model, LoraConfig(target_modules=["q_proj", "k_proj"], r=2, init_lora_weights=False))
    lora.eval()
    want = expected(weights(lora.get_base_model(), case.inputs), case.frames.ids, [1, 2, 3])[:, ROWS]
    assert (want - expected(case.attentions, case.frames.ids, [1, 2, 3])[:, ROWS]).abs().max() > 1e-3 * want.max()
    for model in (lora, Wrapper(lora)):
        with torch.no_grad(), record_frame_mass(model, case.frames, rows=ROWS) as recorder:
            model(**case.inputs)
        models.assert_mass_close(recorder.mass, want)
    assert_nothing_left(lora.get_base_model())


def test_under_autocast_and_in_inference_mode(case: Case) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = case.logits()
        with record_frame_mass(case.model, case.frames, rows=ROWS) as recorder:
            assert torch.equal(case.logits(), before)
        attentions = weights(case.model, case.inputs)
    assert recorder.mass.dtype == torch.float32
    framework, exact = (expected(a, case.frames.ids, [1, 2, 3])[:, ROWS] for a in (attentions, case.attentions))
    assert_as_good_as(recorder.mass, exact, framework)

    with torch.inference_mode(), record_frame_mass(case.model, case.frames, rows=ROWS) as inferred:
        case.logits()
    # Made in inference mode, the mass can still weight a loss.
    scale = torch.ones(1, requires_grad=True)
    (scale * inferred.mass).sum().backward()
    models.assert_mass_close(inferred.mass, expected(case.attentions, case.frames.ids, [1, 2, 3])[:, ROWS])


def test_with_a_kv_cache_rows_are_positions_in_the_whole_sequence(case: Case) -> None:
    length = case.valid.shape[1]
    prompt = length - RESPONSE
    cache = DynamicCache(config=case.model.config.text_config)
    first = {
        name: value[:, :prompt] if value.shape[:2] == (2, length) else value for name, value in case.inputs.items()
    }
    rest = {"input_ids": case.inputs["input_ids"][:, prompt:], "attention_mask": case.inputs["attention_mask"]}
    known = inspect.signature(case.model.model.get_rope_index).parameters
    positions, _ = case.model.model.get_rope_index(**{k: v for k, v in case.inputs.items() if k in known})
    rest["position_ids"] = positions[..., prompt:]
    name = cache_argument(case.model)
    with torch.no_grad():
        case.model(**first, **{name: cache})
        with record_frame_mass(case.model, case.frames, rows=slice(prompt, length)) as recorder:
            case.model(**rest, **{name: cache})
        models.assert_mass_close(recorder.mass, expected(case.attentions, case.frames.ids, [1, 2, 3])[:, prompt:])
        cache.crop(prompt - length)
        with (
            pytest.raises(ValueError, match=rf"`rows`: expected positions {prompt} to {length - 1}.*got {prompt - 1}"),
            record_frame_mass(case.model, case.frames, rows=response_rows(prompt, RESPONSE)),
        ):
            case.model(**rest, **{name: cache})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # of transformers 5.24 and later, and of earlier ones
def test_a_static_cache_is_refused_under_any_name(case: Case, name: str) -> None:
    static = StaticCache(config=case.model.config.text_config, max_cache_len=case.valid.shape[1] + 3)
    decoder = case.model.get_decoder()
    with (
        pytest.raises(ValueError, match=r"a KV cache.*StaticCache. .*DynamicCache"),
        record_frame_mass(case.model, case.frames, rows=ROWS),
    ):
        decoder(input_ids=case.inputs["input_ids"], **{name: static})
    with (
        pytest.raises(ValueError, match=r"a KV cache.*StaticCache. .*DynamicCache"),
        record_frame_mass(case.model, case.frames, rows=ROWS),
    ):
        case.model(**case.inputs, **{cache_argument(case.model): static})


def test_frames_of_the_wrong_shape_are_refused_in_the_forward(case: Case) -> None:
    prompt_only = FrameIds(case.frames.ids[:, :-RESPONSE], case.frames.num_frames)
    for wrong in (prompt_only, FrameIds(case.frames.ids[:1], case.frames.num_frames[:1])):
        with (
            pytest.raises(ValueError, match=r"`frame_ids`: expected shape \(B, S\)"),
            record_frame_mass(case.model, wrong, rows=slice(0, 1)),
            torch.no_grad(),
        ):
            case.logits()


# One argument at a time that does not fit the model or the sequences.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": slice(0, 10_000)}, "`rows`: expected a slice within the"),
        ({"rows": slice(3, 3)}, "`rows`: expected at least one position"),
        ({"rows": torch.tensor([[0], [-1]])}, "`rows`: expected positions 0 to"),
        ({"rows": torch.tensor([[0], [10_000]])}, "`rows`: expected positions 0 to"),
        ({"rows": torch.tensor([[0]])}, r"`rows`: expected shape \(B, R\)"),
        ({"rows": torch.tensor([0, 1])}, "`rows`: expected a tensor of 2 dimensions"),
        ({"rows": torch.tensor([[0.0], [1.0]])}, "`rows`: expected dtype int32 or int64"),
        ({"layers": 0}, "`layers`: expected 1 to 4"),
        ({"layers": 5}, "`layers`: expected 1 to 4"),
        ({"layers": [4]}, r"`layers`: expected distinct layers with attention, out of \[0, 1, 2, 3\]"),
        ({"layers": [3, -1]}, "`layers`: expected distinct"),
        ({"layers": []}, "`layers`: expected distinct"),
        ({"reduction": "max"}, '`reduction`: expected "mean" or "sum"'),
        ({"frame_ids": torch.zeros(2, 0).int()}, "`frame_ids`: expected at least one token"),
        ({"frame_ids": torch.zeros(2, 9)}, "`frame_ids`: expected dtype"),
        (
            {"frame_ids": FrameIds(torch.ones(1, 9).int(), torch.tensor([1]))},
            "`frame_ids`: expected ids below num_frames = 1",
        ),
        ({"model": nn.Linear(2, 2)}, "`model`: expected a transformers model"),
    ],
)
def test_arguments_are_checked(built: Case, arguments: dict[str, Any], message: str) -> None:
    arguments = {"model": built.model, "frame_ids": built.frames, "rows": ROWS, **arguments}
    with pytest.raises(ValueError, match="record_frame_mass: " + message):
        record_frame_mass(arguments.pop("model"), arguments.pop("frame_ids"), **arguments)
    assert_nothing_left(built.model)


def test_response_rows() -> None:
    assert response_rows(7, 3) == slice(6, 9)
    with pytest.raises(ValueError, match=r"at least one token each, got \(0, 3\)"):
        response_rows(0, 3)
