"""record_frame_mass(gradient=True): the gradient of eager attention's own weights, in whatever forward."""

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from test_packed_attention import FRAMES, Inputs, text_model, wrapped
from torch import Tensor, nn

from appo import record_frame_mass
from appo.models.loaded import enable_checkpointing
from appo.models.packed_attention import packed_mask, use_packed_attention

S, ROWS = 26, slice(14, 26)
TOLERANCE = 1e-5


def frame_ids(batch: int = 2) -> Tensor:
    """(B, S): frames of 4, 1 and 6 keys with gaps, the second frame without a key; shifted in the second sequence."""
    ids = torch.full((S,), -1)
    ids[1:5], ids[6], ids[8:14] = 0, 2, 3
    return torch.stack([ids, ids.roll(-1)][:batch])


def slopes(batch: int, rows: int, frames: int = 4) -> Tensor:
    return torch.randn(batch, rows, frames, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, scalar: Tensor) -> dict[str, Tensor]:
    """Of every trained parameter; zeros where none comes."""
    model.zero_grad()
    scalar.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


def assert_equal_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    scale = max(float(value.abs().max()) for value in want.values())
    assert scale > 0 and got.keys() == want.keys()
    reached = [name for name, value in want.items() if float(value.abs().max()) > 1e-5 * scale]
    assert any("q_proj" in name for name in reached) and any("k_proj" in name for name in reached)
    whole_got, whole_want = (torch.cat([found[name].flatten() for name in want]).double() for found in (got, want))
    error = float((whole_got - whole_want).norm() / whole_want.norm())
    assert error <= tolerance, f"{error:.1e}"


def eager_mass(model: Any, ids: Tensor, rows: Any, frames: int, reduction: str, **inputs: Any) -> Tensor:
    """(B, R, F), the mean over heads and the last two layers of eager attention's weights, with their gradient."""
    attentions = model(**inputs, output_attentions=True, use_cache=False).attentions[-2:]
    one_hot = (ids[:, :, None] == torch.arange(frames)).float()
    mass = torch.stack([a.mean(1) @ one_hot for a in attentions]).mean(0)
    if reduction == "mean":
        mass = mass / one_hot.sum(1).clamp(min=1)[:, None]
    return mass[:, rows]


def text_inputs() -> dict[str, Tensor]:
    mask = torch.ones(2, S, dtype=torch.long)
    mask[1, :3] = 0
    ids = torch.randint(0, 90, (2, S), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask}


def qwen2() -> Any:
    return models.qwen2()


def qwen2_with_windows() -> Any:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return models.qwen2(use_sliding_window=True, sliding_window=9, layer_types=kinds)


def qwen2_5_vl_text() -> Any:
    return wrapped(text_model("Qwen2_5_VL"))


def qwen3_vl_text() -> Any:
    return wrapped(text_model("Qwen3VL"))


# A decoder for text, one with windows (another visibility by layer), two with rotary positions in three parts.
@pytest.mark.parametrize("build", [qwen2, qwen2_with_windows, qwen2_5_vl_text, qwen3_vl_text])
# "mean" divides by the keys of a frame, one of which has none.
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradient_is_that_of_eager_attention(build: Callable[[], Any], reduction: str) -> None:
    model, ids, given = build(), frame_ids(), text_inputs()
    model.set_attn_implementation("eager")
    want = gradients(model, (eager_mass(model, ids, ROWS, 4, reduction, **given) * slopes(2, 12)).sum())
    model.set_attn_implementation("sdpa")
    with record_frame_mass(model, ids, rows=ROWS, layers=2, reduction=reduction, gradient=True) as recorder:
        model(**given, use_cache=False)
    assert recorder.mass.requires_grad and recorder.mass.dtype == torch.float32
    assert_equal_gradients(gradients(model, (recorder.mass * slopes(2, 12)).sum()), want)


def test_mass_with_gradient_is_the_mass_without() -> None:
    model, ids = qwen2(), frame_ids()
    found = []
    for gradient in (False, True):
        with record_frame_mass(model, ids, rows=ROWS, layers=3, gradient=gradient) as recorder:
            model(**text_inputs())
        assert recorder.mass.requires_grad == gradient
        found.append(recorder.mass.detach())
    torch.testing.assert_close(*found, atol=1e-7, rtol=0)


@pytest.mark.parametrize("build", [qwen2, qwen3_vl_text])
# The context left before the backward, as a `with` around the forward does; and open, when layers are computed again.
@pytest.mark.parametrize("left", [True, False])
def test_checkpointed_layers_record_once(build: Callable[[], Any], left: bool) -> None:
    model, ids, given = build().train(), frame_ids(), text_inputs()

    def found() -> dict[str, Tensor]:
        recorder = record_frame_mass(model, ids, rows=ROWS, layers=2, reduction="sum", gradient=True)
        with recorder:
            out = model(**given, use_cache=False)[0]
            loss = (recorder.mass * slopes(2, 12)).sum() + out.square().mean()
            before = recorder.mass.detach().clone()
            if not left:
                result = gradients(model, loss)
                assert torch.equal(recorder.mass.detach(), before), "a layer that is computed again adds nothing"
                return result
        return gradients(model, loss)

    want = found()
    enable_checkpointing(model)
    assert_equal_gradients(found(), want)


def test_adapters_alone_are_trained() -> None:
    peft = pytest.importorskip("peft")
    model, ids, given = qwen2(), frame_ids(), text_inputs()
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    model.set_attn_implementation("eager")
    want = gradients(adapted, (eager_mass(adapted, ids, ROWS, 4, "sum", **given) * slopes(2, 12)).sum())
    assert all("lora" in name for name in want)
    model.set_attn_implementation("sdpa")
    adapted.enable_input_require_grads()
    enable_checkpointing(model)
    adapted.train()
    for module in adapted.modules():  # adapters' dropout is 0 here; nothing else is random
        assert not isinstance(module, nn.Dropout) or module.p == 0
    with record_frame_mass(adapted, ids, rows=ROWS, layers=2, reduction="sum", gradient=True) as recorder:
        adapted(**given, use_cache=False)
    assert_equal_gradients(gradients(adapted, (recorder.mass * slopes(2, 12)).sum()), want)


# With and without a second forward, in which nothing is recorded.
@pytest.mark.parametrize("checkpointed", [False, True])
def test_under_autocast_it_is_as_close_as_eager_attention_under_autocast(checkpointed: bool) -> None:
    model, ids, given = qwen2().train(), frame_ids(), text_inputs()
    model.set_attn_implementation("eager")
    exact = gradients(model, (eager_mass(model, ids, ROWS, 4, "sum", **given) * slopes(2, 12)).sum())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = eager_mass(model, ids, ROWS, 4, "sum", **given)
    theirs = gradients(model, (theirs.float() * slopes(2, 12)).sum())
    model.set_attn_implementation("sdpa")
    if checkpointed:
        enable_checkpointing(model)
    with (
        record_frame_mass(model, ids, rows=ROWS, layers=2, reduction="sum", gradient=True) as recorder,
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(**given, use_cache=False)
    ours = gradients(model, (recorder.mass * slopes(2, 12)).sum())

    def error(found: dict[str, Tensor]) -> float:
        return float(torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm())

    assert error(ours) <= 1.5 * error(theirs)


# Both families' attention (one normalises queries and keys), with and without recomputation.
@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen3VL"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_groups_have_the_gradient_of_separate_sequences(family: str, checkpointed: bool) -> None:
    """Responses behind one prompt: its gradient is the sum over them, from frames and from the keys they share."""
    model, inputs = wrapped(text_model(family)), Inputs()
    weights = slopes(1, inputs.layout.tokens, FRAMES)
    model.set_attn_implementation("eager")
    total = torch.zeros(())
    responses = [r for group in inputs.layout.groups for r in group.responses]
    for keep, response in zip(inputs.alone, responses, strict=True):
        own = slice(len(keep) - (response.stop - response.start), None)
        positions = inputs.places[keep].expand(3, 1, -1)
        mass = eager_mass(
            model, inputs.frame_ids[:, keep], own, FRAMES, "sum", input_ids=inputs.ids[:, keep], position_ids=positions
        )
        total = total + (mass * weights[:, response]).sum()
    want = gradients(model, total)
    use_packed_attention(model)
    if checkpointed:
        model.train()
        enable_checkpointing(model)
    rows = torch.cat([torch.arange(r.start, r.stop) for r in responses])
    recorder = record_frame_mass(model, inputs.frame_ids, rows=rows[None], layers=2, reduction="sum", gradient=True)
    with recorder:
        model(
            input_ids=inputs.ids, attention_mask=packed_mask("cpu"), position_ids=inputs.places.expand(3, 1, -1),
            group_layout=inputs.layout, use_cache=False,
        )  # fmt: skip
    assert_equal_gradients(gradients(model, (recorder.mass * weights[:, rows]).sum()), want)


def test_no_gradient_to_keep_is_an_error() -> None:
    model, ids = qwen2(), frame_ids()
    recorder = record_frame_mass(model, ids, rows=ROWS, gradient=True)
    expected = r"^record_frame_mass: `gradient`: expected a gradient on query or key of a tapped layer, out of \[1, 2"
    with pytest.raises(ValueError, match=expected), recorder, torch.no_grad():
        model(**text_inputs())
    frozen = qwen2().requires_grad_(False)
    with pytest.raises(ValueError, match=expected), record_frame_mass(frozen, ids, rows=ROWS, gradient=True):
        frozen(**text_inputs())
    enable_checkpointing(model.train(), reentrant=True)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    with (
        pytest.raises(ValueError, match="use_reentrant=False"),
        record_frame_mass(model, ids, rows=ROWS, layers=1, gradient=True),
    ):
        model(**text_inputs(), use_cache=False)
    with pytest.raises(ValueError, match="`gradient`: expected True or False"):
        record_frame_mass(model, ids, rows=ROWS, gradient=1)
