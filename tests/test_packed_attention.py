"""attn_implementation "appo": packed groups in transformers' text models are as separate sequences."""

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import Tensor, nn

from appo import record_frame_mass
from appo.models.loaded import enable_checkpointing
from appo.models.packed_attention import NAME, cannot_pack, packed_mask, use_packed_attention
from appo_kernels import GroupLayout

WIDTH, VOCABULARY, FRAMES = 64, 97, 3
# Two groups: responses unequal, one empty, one of a single token; prompts unequal, one with more frames than the other.
PROMPTS, RESPONSES = [19, 12], [[9, 0, 1, 6], [5, 5]]


def text_model(family: str, **changes: Any) -> Any:
    """A tiny text decoder of a video model; attention far from uniform, so that a wrong key shows."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "pad_token_id": 0, "use_cache": False,
    }  # fmt: skip
    if family == "Qwen3VLMoe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = getattr(transformers, f"{family}TextConfig")(**sizes | changes)
    module = __import__(f"transformers.models.{config_module(family)}", fromlist=["x"])
    torch.manual_seed(0)
    return getattr(module, f"{family}TextModel")(config).float().eval()


def config_module(family: str) -> str:
    name = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl", "Qwen3VLMoe": "qwen3_vl_moe"}[
        family
    ]
    return f"{name}.modeling_{name}"


class Inputs:
    """The same groups as one packed row, and as sequences of their own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.layout = GroupLayout(PROMPTS, RESPONSES)
        self.ids = torch.randint(0, VOCABULARY, (1, self.layout.tokens), generator=generator)
        places, rows, self.alone = [], [], []
        self.frame_ids = torch.full_like(self.ids, -1)
        for number, group in enumerate(self.layout.groups):
            length = group.prompt.stop - group.prompt.start
            places.append(torch.arange(length))
            frames = torch.arange(FRAMES - number).repeat_interleave(3 + number)
            self.frame_ids[0, group.prompt.start + 2 : group.prompt.start + 2 + len(frames)] = frames
            for response in group.responses:
                count = response.stop - response.start
                places.append(length + torch.arange(count))
                rows += [group.prompt.stop - 1, *range(response.start, response.stop - 1)]
                self.alone.append(torch.cat([torch.arange(s.start, s.stop) for s in (group.prompt, response)]))
        self.places, self.rows = torch.cat(places), torch.tensor(rows)

    def packed(self, model: Any) -> Tensor:
        """(M, D) hidden states that predict the responses."""
        states = model(
            input_ids=self.ids, position_ids=self.places.expand(3, 1, -1), attention_mask=packed_mask("cpu"),
            group_layout=self.layout, use_cache=False,
        ).last_hidden_state  # fmt: skip
        return states[0, self.rows]

    def separate(self, model: Any) -> Tensor:
        found = []
        for chosen in self.alone:
            ids = self.ids[:, chosen]
            states = model(input_ids=ids, position_ids=self.places[chosen].expand(3, 1, -1), use_cache=False)
            found.append(states.last_hidden_state[0, self.own_rows(chosen)])
        return torch.cat(found)

    def own_rows(self, chosen: Tensor) -> slice:
        length = next(g.prompt.stop - g.prompt.start for g in self.layout.groups if g.prompt.start == int(chosen[0]))
        return slice(length - 1, len(chosen) - 1)


def gradients(model: nn.Module, forward: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states and the gradient of all parameters."""
    model.zero_grad(set_to_none=True)
    hidden = forward(model)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden.double() * upstream).sum().backward()
    return hidden.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def agree(model: nn.Module, wanted: tuple[Tensor, Tensor], inputs: Inputs) -> None:
    for got, expected in zip(gradients(model, inputs.packed), wanted, strict=True):
        assert distance(got, expected) < 1e-5


# All families whose text models APPO packs; Qwen3-VL normalises queries and keys, its MoE routes tokens one by one.
@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe"])
def test_hidden_states_and_gradients_of_separate_sequences(family: str) -> None:
    model, inputs = text_model(family), Inputs()
    wanted = gradients(model, inputs.separate)
    use_packed_attention(wrapped(model))
    agree(model, wanted, inputs)
    # A forward without a layout is that of sdpa.
    assert distance(inputs.separate(model), wanted[0]) < 1e-6


def wrapped(model: Any) -> Any:
    """A text model as `use_packed_attention` takes it, with a decoder."""
    model.get_decoder = lambda: model
    return model


# Both kinds: one runs the first forward without gradients.
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, inputs = text_model("Qwen2_5_VL"), Inputs()
    wanted = gradients(model, inputs.separate)
    use_packed_attention(wrapped(model))
    enable_checkpointing(model.train(), reentrant=reentrant)
    if reentrant:  # its blocks need an input that has a gradient
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    agree(model, wanted, inputs)


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = text_model("Qwen3VL"), Inputs()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    wanted = gradients(adapted, inputs.separate)
    use_packed_attention(wrapped(model))
    agree(adapted, wanted, inputs)


def test_compiled_once_for_all_lengths() -> None:
    model, inputs = text_model("Qwen2_5_VL"), Inputs()
    wanted = gradients(model, inputs.separate)
    use_packed_attention(wrapped(model))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    plain = model.forward
    model.forward = torch.compile(plain, backend=counter, fullgraph=True)
    agree(model, wanted, inputs)
    graphs = counter.frame_count
    inputs.layout = GroupLayout([18, 13], [[9, 1, 1, 5], [4, 6]])
    got = gradients(model, inputs.packed)
    model.forward = plain
    assert counter.frame_count == graphs
    assert distance(got[1], gradients(model, inputs.packed)[1]) < 1e-6


def test_bf16_autocast_is_no_further_from_fp64_than_separate_sequences() -> None:
    model, inputs = text_model("Qwen2_5_VL"), Inputs()
    exact = gradients(text_model("Qwen2_5_VL").double(), inputs.separate)
    with torch.autocast("cpu", torch.bfloat16):
        separate = gradients(model, inputs.separate)
        use_packed_attention(wrapped(model))
        packed = gradients(model, inputs.packed)
    for ours, theirs, true in zip(packed, separate, exact, strict=True):
        assert distance(ours, true) < 1.1 * distance(theirs, true)


# Both reductions, of which one counts keys; queries in the dtype of the model and narrowed by autocast.
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("autocast", [False, True])
def test_mass_of_each_group_on_its_own_frames(reduction: str, autocast: bool) -> None:
    """Groups number their frames alike, and "mean" counts the keys of a group's own."""
    built, inputs = models.qwen2(heads=4, kv_heads=2), Inputs()

    def call(packed: bool, ids: Tensor, **more: Any) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            built.model(input_ids=ids, use_cache=False, **more)

    expected = []
    for chosen in inputs.alone:
        rows = inputs.own_rows(chosen)
        with record_frame_mass(built, inputs.frame_ids[:, chosen], rows=rows, reduction=reduction) as recorder:
            call(False, inputs.ids[:, chosen])
        expected.append(torch.nn.functional.pad(recorder.mass[0], (0, FRAMES - recorder.mass.shape[-1])))
    use_packed_attention(built)
    with record_frame_mass(built, inputs.frame_ids, rows=inputs.rows[None], reduction=reduction) as recorder:
        call(
            True,
            inputs.ids,
            attention_mask=packed_mask("cpu"),
            group_layout=inputs.layout,
            position_ids=inputs.places[None],
        )
    assert distance(recorder.mass[0], torch.cat(expected)) < (5e-2 if autocast else 1e-5)
    # Prompt rows see the frames up to themselves.
    every = torch.arange(inputs.layout.tokens)[None]
    with record_frame_mass(built, inputs.frame_ids, rows=every, reduction=reduction) as whole:
        call(
            True,
            inputs.ids,
            attention_mask=packed_mask("cpu"),
            group_layout=inputs.layout,
            position_ids=inputs.places[None],
        )
    torch.testing.assert_close(whole.mass[:, inputs.rows], recorder.mass, atol=1e-6, rtol=0)
    assert not whole.mass[0, :2].any()


def test_layout_and_mask_come_together() -> None:
    model, inputs = text_model("Qwen2_5_VL"), Inputs()
    use_packed_attention(wrapped(model))
    arguments = {"input_ids": inputs.ids, "position_ids": inputs.places.expand(3, 1, -1), "use_cache": False}
    for wrong in ({"attention_mask": packed_mask("cpu")}, {"group_layout": inputs.layout}):
        with pytest.raises(ValueError, match=f"{NAME}: `attention_mask`: expected .* in layer 0, got "):
            model(**arguments, **wrong)
    plain = text_model("Qwen2_5_VL")
    with pytest.raises((ValueError, RuntimeError)):  # sdpa fails on the packed mask
        plain(**arguments, attention_mask=packed_mask("cpu"), group_layout=inputs.layout)


def test_frames_in_a_response_are_refused() -> None:
    built, inputs = models.qwen2(heads=4, kv_heads=2), Inputs()
    use_packed_attention(built)
    inputs.frame_ids[0, -1] = 0
    with (
        pytest.raises(ValueError, match="FramePlan: `frame_ids`: expected frames in prompts only"),
        record_frame_mass(built, inputs.frame_ids, rows=inputs.rows[None]),
    ):
        built.model(
            input_ids=inputs.ids, attention_mask=packed_mask("cpu"), group_layout=inputs.layout,
            position_ids=inputs.places[None], use_cache=False,
        )  # fmt: skip


def decoder_only(name: str, **changes: Any) -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes | changes))


# A window by kinds of layers, by the config alone (Mistral), soft caps, sinks.
@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer 1 .*sliding"),
        ("Gemma2", {}, "layer 0 .*sliding|soft caps"),
        ("Mistral", {"sliding_window": 8}, "sliding window of 8"),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "sliding|sinks"),
    ],
)
def test_layers_that_cannot_are_named(name: str, changes: dict[str, Any], reason: str) -> None:
    model = decoder_only(name, **changes)
    with pytest.raises(
        ValueError, match=rf"appo: `model`: expected text layers of full causal attention, got .*({reason})"
    ):
        use_packed_attention(model)
    assert cannot_pack(models.qwen2()) is None and cannot_pack(decoder_only("Mistral", sliding_window=None)) is None
