"""The memory that `appo plan` tells, against what small models take."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from published_models import BOTH, adapted, build, medium, small
from torch import Tensor

from appo.planning.plan import Plan
from appo.planning.workload import Workload

WITHIN = 0.10


def saved_bytes(model: Any, embedded: Tensor, mask: Tensor, *, mixed: bool) -> int:
    """Bytes that the forward of a decoder keeps for its backward."""
    return kept_bytes(model, lambda: model(inputs_embeds=embedded, attention_mask=mask, use_cache=False), mixed=mixed)


def kept_bytes(model: Any, forward: Callable[[], Any], *, mixed: bool) -> int:
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
        forward()
    return sum(size for size, _ in kept.values())


# Both families; fp32 and bf16 under autocast; all weights trained, and adapters, whose frozen layers keep less.
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


# Windows and gated layers, whole frames and plain ones; fp32, and bf16 under autocast.
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_activations_of_a_trained_tower(name: str, mixed: bool) -> None:
    frames, side, sizes = 3, 16, small(name)
    tower, vision = build(sizes).model.visual.train(), sizes.vision
    tower.set_attn_implementation("sdpa")
    pixels = torch.randn(frames * side**2, 3 * vision.temporal_patch * vision.patch**2)
    grid = torch.tensor([[frames, side, side]])
    taken = kept_bytes(tower, lambda: tower(pixels, grid_thw=grid), mixed=mixed)
    work = Workload(frames=frames, frame_tokens=side**2 // vision.merge**2, prompts=1, mixed=mixed, freeze_vision=False)
    plan = Plan(sizes, work)
    assert plan.tower_activations() == pytest.approx(taken, rel=WITHIN)
    frozen = Plan(sizes, replace(work, freeze_vision=True))
    assert plan.activations() - frozen.activations() == plan.tower_activations()
    again = Plan(sizes, replace(work, checkpointing=True, checkpoint_every=2))  # the first and third of three
    inputs = 2 * plan.micro_patches * vision.hidden * work.width
    assert again.tower_activations() - inputs == pytest.approx(
        plan.tower_activations() - 2 * plan.micro_patches * plan.tower_layer_activations()
    )
    offloaded = Plan(sizes, replace(again.work, checkpoint_offload=True))
    assert again.tower_activations() - offloaded.tower_activations() == inputs
    assert offloaded.host_bytes() > inputs


MEASURE = """
import gc, json, mmap, sys, torch
from appo_kernels import GroupLayout, linear_weighted_surrogate
from appo_kernels.testing import peak_extra_bytes
from appo.models import loaded
from appo.models.loaded import enable_checkpointing, unwrapped
from appo.models.packed_attention import packed_mask, use_packed_attention
from tests.published_models import adapted, build, medium
name, B, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
rank, shared, P, N = settings.get("lora_rank", 0), settings.get("share_prompt", False), 96, 160
torch.set_num_threads(1)
sizes = medium(name)
model = build(sizes).model.language_model
head = torch.nn.Parameter(torch.randn(sizes.vocabulary, sizes.hidden) * 0.02, requires_grad=not rank)
class Host(torch.autograd.graph.saved_tensors_hooks):  # memory that torch's allocator, here the GPU's, knows nothing of
    def __init__(self, pin_memory):
        super().__init__(self.pack, torch.clone)
    def pack(self, tensor):
        return torch.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
loaded.save_on_cpu = Host
if settings.get("checkpointing"):
    enable_checkpointing(
        model, every=settings.get("checkpoint_every", 1), offload=settings.get("checkpoint_offload", False)
    )
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


# Both families as they come; checkpointing of all layers, of every second and third of five, so that the last one is
# computed again and is not, with inputs on the host; adapters, whose frozen layers keep less; a group behind one
# prompt, with as many tokens less and no mask; all of it together; groups split into parts.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (BOTH[0], {}),
        (BOTH[1], {}),
        (BOTH[0], {"checkpointing": True}),
        (BOTH[0], {"checkpointing": True, "checkpoint_every": 2}),
        (BOTH[1], {"checkpointing": True, "checkpoint_every": 3}),
        (BOTH[0], {"checkpointing": True, "checkpoint_offload": True}),
        (BOTH[1], {"checkpointing": True, "checkpoint_every": 2, "checkpoint_offload": True, "share_prompt": True}),
        (BOTH[0], {"lora_rank": 16}),
        (BOTH[1], {"lora_rank": 16}),
        (BOTH[0], {"share_prompt": True}),
        (BOTH[1], {"share_prompt": True}),
        (BOTH[0], {"checkpointing": True, "lora_rank": 16, "share_prompt": True}),
        (BOTH[0], {"checkpointing": True, "checkpoint_every": 2, "lora_rank": 16, "share_prompt": True}),
        (BOTH[1], {"checkpointing": True, "checkpoint_offload": True, "lora_rank": 16}),
        (BOTH[0], {"share_prompt": True, "micro_tokens": 800}),
        (BOTH[1], {"micro_tokens": 800}),
    ],
)
def test_peak_memory_of_an_update(name: str, settings: dict[str, Any]) -> None:
    """A process of its own: peak of torch's allocator over forward, loss and backward of a micro-batch, in fp32."""
    sizes = medium(name)
    work = Workload(
        frames=1, frame_tokens=1, text=95 - sizes.frame_text, response=160, prompts=1, mixed=False, **settings
    )
    plan = Plan(sizes, work)
    assert plan.sequence == 256
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, name, str(plan.micro_responses), json.dumps(settings)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what the C allocator keeps is not the model's
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    parts = plan.update_bytes() | {"gradients": 0.0}
    mib = {part: round(size / 2**20, 1) for part, size in parts.items()}
    print(name, settings, mib, {key: size / 2**20 for key, size in measured.items()})
    # On a CPU the loss passes over rows in two buffers more, of at most 4 MiB each.
    parts["at work"] = max(plan.backward_workspace(), plan.head_workspace() + 2 * min(4 << 20, plan.head_tile()))
    assert sum(parts.values()) == pytest.approx(measured["extra"], rel=WITHIN)
    assert 16 * plan.trained == measured["standing"]  # weights, gradients, two moments of what is trained
