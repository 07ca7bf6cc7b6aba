"""`appo plan`: its figures against real models (memory: test_planned_memory.py), and what it takes and refuses."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from published_models import BOTH, build, small
from torch.utils.flop_counter import FlopCounterMode

from appo.config import APPOConfig, ConfigError
from appo.models.architectures import ARCHITECTURES
from appo.planning.fit import fit, options
from appo.planning.plan import GIB, Plan, planned
from appo.planning.workload import Machine, Workload
from appo.train.micro_batches import micro_batches
from appo_kernels import GroupLayout, frame_mass, group_divergence, linear_weighted_surrogate, token_logprobs
from appo_kernels.ops.frame_mass import op as frame_mass_op
from appo_kernels.ops.group_divergence import op as group_divergence_op
from appo_kernels.ops.token_logprobs import op as token_logprobs_op
from appo_kernels.ops.weighted_surrogate import autograd as surrogate_op
from appo_kernels.vocabulary.output_head import tile_rows

WITHIN = 0.10


# Both families: heads of the hidden size, and of a size of their own.
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


# Attention within windows, and over the whole frame.
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
    # The same log-probabilities: nothing is clipped and left out.
    old = token_logprobs(rows, weight, targets.flatten()).logprobs.view(G, N).detach()
    arguments = hidden, weight, targets, old, torch.linspace(-1, 1, G), torch.ones(G, N)
    found = counted(lambda: linear_weighted_surrogate(*arguments, backend="torch").loss.backward())
    assert found == pytest.approx(3 * plan.head_flop(G * N), rel=WITHIN)


# The settings that the documentation names.
@pytest.mark.parametrize(("model", "gpus"), [("Qwen2.5-VL-3B", 1), ("Qwen2.5-VL-7B", 8), ("Qwen2.5-VL-72B", 64)])
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


def test_a_fit_has_no_change_that_it_fits_without() -> None:
    base = Plan(ARCHITECTURES["Qwen2.5-VL-7B"], Workload(micro_groups=4))
    assert fit(base, 1000 * GIB) == base
    for memory in (150, 80, 24):
        plan = fit(base, memory * GIB)
        assert plan is not None and plan.peak() <= memory * GIB < base.peak() and options(base, plan)
        assert plan.work.prompts % plan.work.gpus == 0
        for name in ("share_prompt", "micro_groups", "checkpoint_offload", "micro_tokens", "rollout_tokens", "offload"):
            fewer = replace(plan, work=replace(plan.work, **{name: getattr(base.work, name)}))
            assert fewer == plan or fewer.peak() > memory * GIB, name
    large = fit(Plan(ARCHITECTURES["Qwen2.5-VL-72B"], Workload()), 80 * GIB)
    assert large is not None and large.work.gpus > 1
    assert fit(base, 1.0) is None


def test_a_fit_changes_what_costs_least_first() -> None:
    """With less and less memory each kind of change comes when those before it are made."""
    base = Plan(ARCHITECTURES["Qwen2.5-VL-7B"], Workload(gpus=8, shard_group=1, micro_groups=4, own_rollout=False))
    order = ["share_prompt", "micro_groups", "checkpointing", "checkpoint_offload", "shard_group", "offload"]
    seen, found = list[Workload](), fit(base, base.peak() - 1)
    while found is not None:
        seen.append(found.work)
        found = fit(base, found.peak() - 1)
    firsts = [[getattr(work, name) != getattr(base.work, name) for work in seen].index(True) for name in order]
    assert firsts == sorted(firsts)
    again = [work.checkpoint_every for work in seen if work.checkpointing]
    assert list(dict.fromkeys(again)) == [4, 2, 1]
    assert not any(work.lora_rank or work.gpus > 8 for work in seen[: firsts[-1] + 1])


def test_a_fit_of_settings_is_written_as_settings() -> None:
    path = str(Path(__file__).parents[1] / "examples" / "qwen2_5_vl_7b_8gpu.yaml")
    plan = planned(APPOConfig.load(path, ["shard=none", "checkpoint_every=2"]), 8)
    found = fit(plan, 80 * GIB)
    assert found is not None
    changes = options(plan, found, settings=True)
    assert changes and found == planned(APPOConfig.load(path, ["checkpoint_every=2", *" ".join(changes).split()]), 8)
    tight = fit(replace(plan, work=replace(plan.work, micro_groups=4)), 0.9 * plan.peak())
    assert tight is not None and tight.work.checkpointing and tight.work.checkpoint_every <= 2  # never loosened


def test_the_command_finds_options_that_fit() -> None:
    from typer.testing import CliRunner

    from appo.cli import app

    found = CliRunner().invoke(app, ["plan", "--model", "Qwen2.5-VL-7B", "--memory", "24", "--fit"])
    assert found.exit_code == 0
    first = found.output.splitlines()[0]
    assert first.startswith("Fits with: --gradient-checkpointing") and "fits in 24 GiB" in found.output
    again = CliRunner().invoke(
        app, ["plan", "--model", "Qwen2.5-VL-7B", "--memory", "24", *first.removeprefix("Fits with: ").split()]
    )
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


# Not positive, not finite, beyond any machine, and other types.
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf, 1e300, True, "8", None])
def test_a_machine_takes_only_sane_numbers(value: Any) -> None:
    for name in ("memory", "rate", "bandwidth"):
        with pytest.raises(ConfigError, match=f"`{name}`: expected"):
            Machine(**{name: value})


# Zero, negative, not a number, infinite and too large, each where it would divide or multiply.
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


def test_options_beside_a_file_are_refused() -> None:
    from typer.testing import CliRunner

    from appo.cli import app

    path = str(Path(__file__).parents[1] / "examples" / "qwen2_5_vl_7b.yaml")
    found = CliRunner().invoke(app, ["plan", "--config", path, "--micro-groups", "1"])
    assert found.exit_code == 2 and found.output.startswith("appo: `micro_groups`: expected settings as name=value")


# Beside --config an option is refused, so that what does not fit is to be told a setting.
def test_advice_can_be_followed() -> None:
    from typer.testing import CliRunner

    from appo.cli import app

    arguments = ["plan", "--config", "examples/qwen2_5_vl_7b_8gpu.yaml", "--gpus", "8", "--memory", "24"]
    found = CliRunner().invoke(app, arguments)
    advice = re.search(r"does not fit in 24 GiB; try (\S+)\n", found.output)
    assert advice is not None, found.output
    followed = CliRunner().invoke(app, [*arguments, advice[1]])
    assert followed.exit_code == 0 and f"try {advice[1]}" not in followed.output, followed.output


def test_the_command_loads_nothing() -> None:
    code = (
        "import sys; sys.argv = ['appo', 'plan', '--model', 'Qwen2.5-VL-72B', '--memory', '16'];"
        "from appo.cli import app\ntry: app()\nexcept SystemExit as e: assert e.code == 0\n"
        "assert 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "does not fit in 16 GiB; try --gradient-checkpointing" in run.stdout
