"""`appo plan`: its figures against real models, and against what small models really take."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from appo.config import ConfigError
from appo.models.architectures import ARCHITECTURES, Architecture, find_architecture, from_config
from appo.plan import GIB, Machine, Plan, Workload, fit
from appo.train.micro_batches import micro_batches
from appo_kernels import GroupLayout, frame_mass, group_divergence, linear_weighted_surrogate, token_logprobs
from appo_kernels.ops.frame_mass import op as frame_mass_op
from appo_kernels.ops.group_divergence import op as group_divergence_op
from appo_kernels.ops.token_logprobs import op as token_logprobs_op
from appo_kernels.ops.weighted_surrogate import autograd as surrogate_op
from appo_kernels.vocabulary.output_head import tile_rows

WITHIN = 0.10


def config_of(sizes: Architecture) -> Any:
    """The transformers config of these sizes."""
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

    vision = sizes.vision
    text = {
        "hidden_size": sizes.hidden, "intermediate_size": sizes.intermediate, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.key_heads, "vocab_size": sizes.vocabulary,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    tower = {
        "depth": vision.depth, "hidden_size": vision.hidden, "intermediate_size": vision.intermediate,
        "num_heads": vision.heads, "out_hidden_size": vision.out_hidden, "patch_size": vision.patch,
    }  # fmt: skip
    half = sizes.head_dim // 2
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    if sizes.query_norm:
        rope["mrope_interleaved"] = True
        text |= {"head_dim": sizes.head_dim, "rope_parameters": rope}
        tower |= {
            "deepstack_visual_indexes": list(range(vision.deepstack)), "num_position_embeddings": vision.positions,
        }  # fmt: skip
        return Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=sizes.tied)
    full = list(range(vision.depth - vision.full_attention, vision.depth))
    window = vision.window * vision.merge * vision.patch
    tower |= {"fullatt_block_indexes": full, "window_size": window}
    text |= {"rope_parameters": rope}
    return Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=sizes.tied)


def build(sizes: Architecture, device: str = "cpu") -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

    kind = Qwen3VLForConditionalGeneration if sizes.query_norm else Qwen2_5_VLForConditionalGeneration
    with torch.device(device):
        return kind(config_of(sizes))


def small(name: str) -> Architecture:
    """The shape of a published model with small sizes, none of them equal to another."""
    sizes = ARCHITECTURES[name]
    vision = replace(
        sizes.vision, depth=3, hidden=96, intermediate=160, heads=4, out_hidden=192,
        full_attention=3 if sizes.query_norm else 1,
        deepstack=2 if sizes.query_norm else 0, positions=64 if sizes.query_norm else 0,
    )  # fmt: skip
    return replace(
        sizes, layers=3, hidden=192, intermediate=448, heads=6, key_heads=2, head_dim=32, vocabulary=640, vision=vision
    )


BOTH = ("Qwen2.5-VL-7B", "Qwen3-VL-8B")


# One tied and one untied head of each family, and both sizes of Qwen3-VL's vision tower.
@pytest.mark.parametrize("name", ["Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen3-VL-2B", "Qwen3-VL-8B"])
def test_parameters_are_exactly_those_of_the_published_model(name: str) -> None:
    sizes = ARCHITECTURES[name]
    model = build(sizes, "meta")
    assert sum(p.numel() for p in model.parameters()) == sizes.parameters
    assert sum(p.numel() for p in model.model.visual.parameters()) == sizes.vision.parameters
    assert sum(p.numel() for p in model.model.language_model.layers[0].parameters()) == sizes.layer_parameters


@pytest.mark.parametrize("name", BOTH)
def test_sizes_are_read_from_a_local_config(name: str, tmp_path: Any) -> None:
    sizes = small(name)
    config_of(sizes).save_pretrained(tmp_path)
    assert find_architecture(str(tmp_path)) == replace(sizes, name=str(tmp_path))
    content = json.loads((tmp_path / "config.json").read_text())
    flat = {**content["text_config"], **{k: v for k, v in content.items() if k != "text_config"}}
    assert from_config(flat, "flat") == replace(sizes, name="flat")


def test_names_are_found_as_they_are_published() -> None:
    assert find_architecture("Qwen/Qwen2.5-VL-7B-Instruct").name == "Qwen2.5-VL-7B"
    assert find_architecture("qwen3-vl-8b").name == "Qwen3-VL-8B"
    with pytest.raises(ConfigError, match=r"`model`: expected a folder .* got 'GPT-9'"):
        find_architecture("GPT-9")
    with pytest.raises(ConfigError, match="expected model_type"):
        from_config({"model_type": "llama"}, "x")
    with pytest.raises(ConfigError, match="expected a field 'depth'"):
        from_config({"model_type": "qwen3_vl"}, "x")


@pytest.mark.parametrize("name", BOTH)
def test_flops_of_the_decoder_forward_and_backward(name: str) -> None:
    """Eager attention, whose backward has two products for each of the forward's."""
    sizes = small(name)
    model = build(sizes).model.language_model
    model.set_attn_implementation("eager")
    B, S = 2, 160
    embedded = torch.randn(B, S, sizes.hidden, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        result = model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    matrices, attention = Plan(sizes, Workload()).layers_flop(B * S, S)
    assert forward.get_total_flops() == pytest.approx(matrices + attention, rel=0.01)
    assert backward.get_total_flops() == pytest.approx(2 * (matrices + attention), rel=WITHIN)


@pytest.mark.parametrize("name", BOTH)
def test_flops_of_the_vision_tower(name: str) -> None:
    sizes = small(name)
    tower = build(sizes).model.visual
    tower.set_attn_implementation("eager")
    frames, side, vision = 3, 16, sizes.vision
    pixels = torch.randn(frames * side**2, 3 * vision.temporal_patch * vision.patch**2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(pixels, grid_thw=torch.tensor([[frames, side, side]]))
    plan = Plan(sizes, Workload(frames=frames, frame_tokens=side**2 // vision.merge**2))
    assert counter.get_total_flops() == pytest.approx(plan.vision_flop(), rel=WITHIN)


def test_flops_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Custom operators hide their products from the counter: here the functions behind them are called."""
    modules = (frame_mass_op, group_divergence_op, token_logprobs_op)
    for module, name in (
        *((module, "forward_op") for module in modules), (surrogate_op, "linear_weighted_surrogate_forward"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(module, name)._init_fn)
    sizes = replace(small("Qwen2.5-VL-7B"), vocabulary=3000)
    work = Workload(frames=4, frame_tokens=32, text=32, response=64, prompts=1, target_frames=2, slots=24)
    plan, G, N = Plan(sizes, work), work.responses, work.response

    def counted(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    hidden, weight = torch.randn(G, N, sizes.hidden), torch.randn(sizes.vocabulary, sizes.hidden) * 0.05
    targets = torch.randint(sizes.vocabulary, (G, N))
    rows = hidden.flatten(0, 1)
    found = counted(lambda: token_logprobs(rows, weight, targets.flatten(), backend="torch"))
    assert found == pytest.approx(plan.head_flop(G * N), rel=WITHIN)

    query, key = (
        torch.randn(G, sizes.heads, N, sizes.head_dim),
        torch.randn(G, sizes.key_heads, plan.sequence, sizes.head_dim),
    )
    ids = torch.full((G, plan.sequence), -1)
    ids[:, 32:160] = torch.arange(128) // 32
    found = counted(lambda: frame_mass(query, key, ids, num_frames=4, backend="torch"))
    assert work.layers * found == pytest.approx(plan.recording_flop(), rel=WITHIN)

    lse = torch.logsumexp(hidden @ weight.t(), -1)
    slots = torch.arange(2 * 24).view(2, 1, 24).expand(2, G, 24)  # no position twice, the most there can be
    found = counted(lambda: group_divergence(hidden, weight, lse, slots, backend="torch"))
    assert found == pytest.approx(plan.divergence_flop(), rel=WITHIN)

    hidden.requires_grad_()
    weight.requires_grad_()
    old = (
        token_logprobs(rows, weight, targets.flatten()).logprobs.view(G, N).detach()
    )  # nothing is clipped and left out
    arguments = hidden, weight, targets, old, torch.linspace(-1, 1, G), torch.ones(G, N)
    found = counted(lambda: linear_weighted_surrogate(*arguments, backend="torch").loss.backward())
    assert found == pytest.approx(3 * plan.head_flop(G * N), rel=WITHIN)


def adapted(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))


def saved_bytes(model: Any, embedded: Tensor, mask: Tensor, *, mixed: bool) -> int:
    """Bytes of all tensors that a forward keeps for its backward, parameters and their bf16 copies left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters()} | {p.t().shape for p in model.parameters() if p.dim() == 2}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        copy_of_weight = tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if storage.data_ptr() not in weights and not copy_of_weight:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_activations_that_a_layer_keeps(name: str, mixed: bool, lora_rank: int) -> None:
    """Two depths: their difference is one layer, without what comes before and after."""
    B, S = 2, 120
    sizes = small(name)
    embedded, mask = torch.randn(B, S, sizes.hidden, requires_grad=True), torch.ones(B, S, dtype=torch.long)
    mask[0, :5] = 0  # padding, as in training
    taken = []
    for layers in (2, 3):
        model = build(replace(sizes, layers=layers)).model.language_model
        model.set_attn_implementation("sdpa")
        if lora_rank:
            model = adapted(model.to(torch.bfloat16) if mixed else model, lora_rank)
            embedded = embedded.detach().to(torch.bfloat16 if mixed else torch.float32).requires_grad_()
        taken.append(saved_bytes(model.train(), embedded, mask, mixed=mixed))
    work = Workload(
        frames=1, frame_tokens=1, text=1, response=S - 2 - sizes.frame_text, mixed=mixed, lora_rank=lora_rank
    )
    plan = Plan(sizes, work)
    assert plan.sequence == S
    assert plan.layer_activations() * B * S == pytest.approx(taken[1] - taken[0], rel=WITHIN)


MEASURE = """
import gc, json, sys, torch
from appo_kernels import GroupLayout, linear_weighted_surrogate
from appo_kernels.testing import peak_extra_bytes
from appo.models.loaded import enable_checkpointing, unwrapped
from appo.models.packed_attention import packed_mask, use_packed_attention
from tests.test_plan import adapted, build, medium
name, checkpointing, rank, shared = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), sys.argv[4] == "True"
B, P, N = int(sys.argv[5]), 96, 160
torch.set_num_threads(1)
sizes = medium(name)
model = build(sizes).model.language_model
head = torch.nn.Parameter(torch.randn(sizes.vocabulary, sizes.hidden) * 0.02, requires_grad=not rank)
if checkpointing:
    enable_checkpointing(model)
if rank:
    model = adapted(model, rank)
    model.enable_input_require_grads()
model.train()
parameters = [p for p in (*model.parameters(), head) if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False)
ids = torch.randint(sizes.vocabulary, (B, P + N))
mask = torch.ones(B, P + N, dtype=torch.long)
mask[:, :3] = 0
layout = GroupLayout([P], [[N] * B])
if shared:
    use_packed_attention(unwrapped(model))
places = torch.cat([torch.arange(P), P + torch.arange(N).repeat(B)])
def forward():
    if not shared:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, P - 1 : P - 1 + N]
    row = torch.cat([ids[:1, :P], ids[:, P:].reshape(1, -1)], 1)
    found = model(input_ids=row, attention_mask=packed_mask("cpu"), position_ids=places.expand(3, 1, -1),
                  group_layout=layout, use_cache=False).last_hidden_state
    return found[:, P:].view(B, N, -1)
def step():
    hidden = forward()
    loss = linear_weighted_surrogate(hidden, head, ids[:, P:], torch.full((B, N), -6.0), torch.linspace(-1, 1, B),
                                     torch.ones(B, N)).loss
    loss.backward()
step()
optimizer.step()  # the optimizer's state is there from now on, and the gradients, as for a second micro-batch
gc.collect()
moments = [x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim()]
standing = sum(p.nbytes + p.grad.nbytes for p in parameters) + sum(moments)
print(json.dumps({"standing": standing, "extra": peak_extra_bytes(step)}))
"""


def medium(name: str) -> Architecture:
    """Large enough for the allocator's own use to be small beside it."""
    sizes = small(name)
    vision = replace(sizes.vision, out_hidden=256)
    return replace(
        sizes, layers=5, hidden=256, intermediate=688, heads=8, key_heads=2, head_dim=32, vocabulary=2048, tied=False,
        vision=vision,
    )  # fmt: skip


# Both families as they come; gradient checkpointing, whose peak is of another kind; adapters, whose frozen layers keep
# less; a group behind one prompt, with as many tokens less and no mask; all of it together; groups split into parts.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing", "lora_rank", "shared", "micro_tokens"),
    [
        (BOTH[0], False, 0, False, 0),
        (BOTH[1], False, 0, False, 0),
        (BOTH[0], True, 0, False, 0),
        (BOTH[0], False, 16, False, 0),
        (BOTH[1], False, 16, False, 0),
        (BOTH[0], False, 0, True, 0),
        (BOTH[1], False, 0, True, 0),
        (BOTH[0], True, 16, True, 0),
        (BOTH[0], False, 0, True, 800),
        (BOTH[1], False, 0, False, 800),
    ],
)
def test_peak_memory_of_an_update(
    name: str, checkpointing: bool, lora_rank: int, shared: bool, micro_tokens: int
) -> None:
    """A process of its own: peak of torch's allocator over forward, loss and backward of a micro-batch, in fp32."""
    sizes = medium(name)
    work = Workload(
        frames=1, frame_tokens=1, text=95 - sizes.frame_text, response=160, prompts=1, mixed=False,
        checkpointing=checkpointing, foreach=False, lora_rank=lora_rank, share_prompt=shared, micro_tokens=micro_tokens,
    )  # fmt: skip
    plan = Plan(sizes, work)
    assert plan.sequence == 256
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURE,
            name,
            str(checkpointing),
            str(lora_rank),
            str(shared),
            str(plan.micro_responses),
        ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what the C allocator keeps is not the model's
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    parts = plan.update_bytes() | {"gradients": 0.0}
    mib = {part: round(size / 2**20, 1) for part, size in parts.items()}
    print(name, checkpointing, lora_rank, shared, mib, {key: size / 2**20 for key, size in measured.items()})
    # On a CPU the loss passes over rows in two buffers more, of at most 4 MiB each.
    parts["at work"] = max(plan.backward_workspace(), plan.head_workspace() + 2 * min(4 << 20, plan.head_tile()))
    assert sum(parts.values()) == pytest.approx(measured["extra"], rel=WITHIN)
    assert 16 * plan.trained == measured["standing"]  # weights, gradients, two moments of what is trained


@pytest.mark.parametrize(
    ("model", "gpus"), [("Qwen2.5-VL-3B", 1), ("Qwen2.5-VL-7B", 8), ("Qwen2.5-VL-72B", 64)]
)  # the settings that the documentation names
def test_documented_settings_fit(model: str, gpus: int) -> None:
    own = model != "Qwen2.5-VL-72B"  # which another engine samples
    work = Workload(
        gpus=gpus, prompts=max(16, gpus), checkpointing=True, share_prompt=True, own_rollout=own, rollout_tokens=32_768
    )
    plan = Plan(ARCHITECTURES[model], work)
    assert plan.peak() <= 80 * GIB
    text = plan.text(memory=80 * GIB, rate=400e12, bandwidth=2.5e12)
    assert "fits in 80 GiB" in text and model in text


def test_more_work_costs_more() -> None:
    base = Plan(ARCHITECTURES["Qwen2.5-VL-7B"], Workload(gpus=8))
    for change in ({"frames": 64}, {"response": 2048}, {"responses": 16}):
        other = Plan(base.model, replace(base.work, **change))
        assert other.peak() > base.peak() and sum(other.flop().values()) > sum(base.flop().values())
    saved = Plan(base.model, replace(base.work, checkpointing=True))
    assert saved.peak() < base.peak() and saved.update_flop() > base.update_flop()
    assert math.isclose(sum(saved.seconds(1e12, 1e30).values()), sum(saved.flop().values()) / 1e12)


def test_what_each_setting_brings() -> None:
    base = Plan(ARCHITECTURES["Qwen2.5-VL-7B"], Workload())
    adapters = Plan(base.model, replace(base.work, lora_rank=64))
    assert adapters.trained < base.trained / 100 and adapters.peak() < base.peak() / 2
    assert adapters.update_flop() < base.update_flop()
    assert Plan(base.model, replace(base.work, lora_rank=128)).peak() > adapters.peak()
    shared = Plan(base.model, replace(base.work, share_prompt=True))
    assert shared.group_tokens == 1150 + 8 * 384 and base.group_tokens == 8 * (1150 + 384)
    assert shared.activations() < base.activations() and shared.score_flop() < base.score_flop()


# Single tokens, one response, and a video's prompt; G, N and P unequal, so that none stands for another.
@pytest.mark.parametrize(("text", "responses", "response"), [(1, 1, 1), (5, 1, 7), (3, 6, 1), (1024, 8, 384)])
def test_a_shared_prompt_costs_the_pairs_of_its_layout(text: int, responses: int, response: int) -> None:
    work = Workload(frames=1, frame_tokens=1, text=text, responses=responses, response=response, share_prompt=True)
    plan = Plan(ARCHITECTURES["Qwen2.5-VL-7B"], work)
    layout = GroupLayout([plan.prompt_tokens], [[response] * responses])
    assert (plan.pairs, plan.group_tokens) == (layout.pairs, layout.tokens)
    attention = plan.layers_flop(plan.group_tokens, plan.keys)[1]
    assert attention == pytest.approx(4 * plan.model.layers * plan.model.query_width * layout.pairs)
    longer = Plan(plan.model, replace(work, text=4 * text + 1000))
    assert longer.layer_activations() == plan.layer_activations()  # of a token: no mask that grows with the keys


# A few tokens, as many as the hidden size, one more, more than a tile holds.
@pytest.mark.parametrize(("responses", "response"), [(1, 1), (8, 384), (7, 512), (5, 717), (8, 1000), (64, 384)])
@pytest.mark.parametrize("name", ["Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen2.5-VL-72B"])
def test_tiles_of_logits_are_those_of_the_loss(name: str, responses: int, response: int) -> None:
    plan = Plan(ARCHITECTURES[name], Workload(responses=responses, response=response))
    sizes = plan.model
    rows = tile_rows(responses * response, sizes.vocabulary, sizes.hidden, 4, on_gpu=True)
    # On a GPU rows of a tile are a multiple of 128.
    assert rows <= plan.head_tile() / (4 * sizes.vocabulary) < rows + 128


# Whole groups, several, one that fits exactly and one token less; two of three responses; one; more than fits alone.
@pytest.mark.parametrize("micro_tokens", [0, 10_000, 2 * 1534, 1534, 1533, 1150 + 2 * 128, 1150 + 128, 1, 2 * 1278])
@pytest.mark.parametrize("shared", [False, True])
def test_splits_are_those_of_the_trainer(micro_tokens: int, shared: bool) -> None:
    work = Workload(
        responses=3, response=128, prompts=2, micro_groups=2, micro_tokens=micro_tokens, share_prompt=shared
    )
    plan = Plan(ARCHITECTURES["Qwen2.5-VL-7B"], work)
    assert plan.prompt_tokens == 1150
    prompt: Any = range(1150)
    groups: list[Any] = [SimpleNamespace(prompt=prompt, mask=torch.ones(3, 128, dtype=torch.bool)) for _ in range(2)]
    batches = list(micro_batches(groups, groups_at_most=2, tokens=micro_tokens, shared=shared))
    sizes = [sum(len(part.responses) for part in batch) for batch in batches]
    assert plan.micro_responses == max(sizes)
    prompts = sum(len(batch) if shared else size for batch, size in zip(batches, sizes, strict=True))
    assert 2 * plan.group_tokens == prompts * 1150 + 6 * 128
    tokens = [(len(batch) if shared else size) * 1150 + size * 128 for batch, size in zip(batches, sizes, strict=True)]
    assert plan.micro_tokens == max(tokens)
    assert 2 * plan.pieces == sum(len(batch) for batch in batches)
    split = Plan(plan.model, replace(work, micro_tokens=1278))
    assert split.activations() <= plan.activations() and split.update_flop() >= plan.update_flop()


def test_a_fit_is_the_first_that_fits() -> None:
    base = Plan(ARCHITECTURES["Qwen2.5-VL-7B"], Workload(micro_groups=4))
    found = fit(base, 1000 * GIB)
    assert found is not None and found == (base, [])
    for memory in (150, 80, 24):
        found = fit(base, memory * GIB)
        assert found is not None
        plan, options = found
        assert plan.peak() <= memory * GIB < base.peak() and options
        assert [o for o in options if "--lora-rank" in o] == (["--lora-rank 64"] if plan.work.lora_rank else [])
        assert plan.work.prompts % plan.work.gpus == 0
    large = fit(Plan(ARCHITECTURES["Qwen2.5-VL-72B"], Workload()), 80 * GIB)
    assert large is not None and large[0].work.gpus > 1
    assert fit(base, 1.0) is None


def test_the_command_finds_options_that_fit() -> None:
    from typer.testing import CliRunner

    from appo.cli import app

    found = CliRunner().invoke(app, ["plan", "--model", "Qwen2.5-VL-7B", "--memory", "24", "--fit"])
    assert found.exit_code == 0
    first = found.output.splitlines()[0]
    assert first.startswith("Fits with: --gradient-checkpointing") and "fits in 24 GiB" in found.output
    options = first.removeprefix("Fits with: ").split()
    again = CliRunner().invoke(app, ["plan", "--model", "Qwen2.5-VL-7B", "--memory", "24", *options])
    assert again.exit_code == 0 and found.output.endswith(again.output)


def test_errors_name_the_field() -> None:
    with pytest.raises(ConfigError, match="`prompts`: expected a multiple of the 64 GPUs"):
        Workload(gpus=64)
    with pytest.raises(ConfigError, match="`frames`: expected at least 1, got 0"):
        Workload(frames=0)


# Numbers of no workload and no machine: not finite, not whole, not positive, beyond any count.
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1.5, 10**20, True, "8", None])
def test_a_workload_takes_only_sane_numbers(value: Any) -> None:
    for name in (
        "frames",
        "frame_tokens",
        "text",
        "response",
        "responses",
        "prompts",
        "micro_groups",
        "layers",
        "gpus",
    ):
        with pytest.raises(ConfigError, match=f"`{name}`: expected"):
            Workload(**{name: value})


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf, 1e300, True, "8", None])
def test_a_machine_takes_only_sane_numbers(value: Any) -> None:
    for name in ("memory", "rate", "bandwidth"):
        with pytest.raises(ConfigError, match=f"`{name}`: expected"):
            Machine(**{name: value})


@pytest.mark.parametrize(
    "option",
    ["--memory=0", "--memory=nan", "--memory=-1", "--rate=-1", "--rate=inf", "--bandwidth=nan", "--prompts=0",
     "--gpus=0", f"--tokens={10**20}", "--frames=-4"],
)  # fmt: skip
def test_the_command_refuses_numbers_that_are_none(option: str) -> None:
    from typer.testing import CliRunner

    from appo.cli import app

    found = CliRunner().invoke(app, ["plan", "--model", "Qwen2.5-VL-7B", option])
    assert found.exit_code == 2 and found.output.startswith("appo: `") and found.output.count("\n") == 1


# Files that are no configuration of a model, or one with sizes of no model.
@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "7", "[" * 100_000, '{"model_type": "qwen3_vl"}', '{"model_type": "qwen3_vl", "text_config": 7}',
     '{"model_type": "qwen2_5_vl", "vision_config": []}'],
)  # fmt: skip
def test_files_that_are_no_configuration(content: str, tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        find_architecture(str(tmp_path))


@pytest.mark.parametrize("value", ["64", -1, 0, 1e400, None, True, [64], 10**12])
def test_sizes_that_no_model_has_are_named(value: Any, tmp_path: Any) -> None:
    config_of(small("Qwen3-VL-8B")).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for part, name in (("text_config", "hidden_size"), ("vision_config", "depth"), ("vision_config", "patch_size")):
        changed = content | {part: content[part] | {name: value}}
        with pytest.raises(ConfigError, match="x: "):
            from_config(changed, "x")


def test_names_that_are_no_paths() -> None:
    for name in ("", "a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match="`model`: expected a folder"):
            find_architecture(name)


def test_the_command_loads_nothing() -> None:
    code = (
        "import sys; sys.argv = ['appo', 'plan', '--model', 'Qwen2.5-VL-72B', '--memory', '16'];"
        "from appo.cli import app\ntry: app()\nexcept SystemExit as e: assert e.code == 0\n"
        "assert 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "does not fit in 16 GiB; try --gradient-checkpointing" in run.stdout
