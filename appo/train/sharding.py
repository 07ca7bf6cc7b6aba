"""Weights, gradients and optimizer state in shards over processes (`shard: fsdp`), with torch's `fully_shard`.

Each decoder layer of the text model is a unit. Everything else (embedding, vision tower, norm, head) belongs to the
root: the tower, so that a batch without pixels makes the collectives of any other; the head, because the fused loss
reads its weight inside the root's forward, without calling it.

Forwards of a sharded policy are collectives, so every process makes equally many of them (`missing`, `idle_group`),
but for those inside `gathered`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from appo.config import APPOConfig, ConfigError
from appo.data.prompts import Prompt
from appo.train.groups import Group
from appo.train.policy import Policy


def loads_weights(config: APPOConfig) -> bool:
    """Whether this process reads the model's weights: where they are sharded, the first one reads them for all."""
    return config.shard == "none" or int(os.environ.get("RANK", 0)) == 0


def place(policy: Policy, config: APPOConfig, accelerator: Accelerator, *, frozen: bool = False) -> nn.Module:
    """``policy`` on the device, over all processes: in shards, or whole in each and their gradients averaged.

    Parameters are replaced when they are sharded: an optimizer is built afterwards. frozen: nothing of it is trained.
    Raises ConfigError for a model that cannot be sharded.
    """
    if config.shard == "none" or (accelerator.num_processes == 1 and not config.offload):
        placed: nn.Module = accelerator.prepare_model(policy, evaluation_mode=frozen)
        return placed
    device, world = accelerator.device, accelerator.num_processes
    shards = config.shard_group or world
    mesh = init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("copies", "shards"))
    compute = None if config.dtype == "float32" else getattr(torch, config.dtype)
    options: dict[str, Any] = {
        "mesh": mesh if shards < world else mesh["shards"],
        # Inputs are cast by autocast; here every float of a batch would be, and dataclasses copied.
        "mp_policy": MixedPrecisionPolicy(compute, torch.float32 if compute else None, cast_forward_inputs=False),
    }
    if config.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for layer in decoder_layers(policy):
        _fill(layer, device)
        fully_shard(layer, reshard_after_forward=True, **options)
    _fill(policy, device)
    # The root of a trained policy stays whole from forward to backward.
    root: Any = fully_shard(policy, reshard_after_forward=True if frozen else None, **options)
    register_fsdp_forward_method(root, "run")
    return policy


def decoder_layers(policy: Policy) -> list[nn.Module]:
    """The layers of the text model."""
    layers = getattr(policy.causal.get_decoder(), "layers", None)
    if not layers:
        raise ConfigError(
            f"`shard`: expected a model whose decoder has `layers`, got {type(policy.causal).__name__}. Set it to none."
        )
    return list(layers)


def _fill(module: nn.Module, device: torch.device) -> None:
    """Parameters and buffers of the first process in every one, on the device, where they are not in shards yet."""
    filled: dict[Tensor, Tensor] = {}  # a tied one once
    for owner in module.modules():
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None or isinstance(tensor, DTensor):
                continue
            if tensor not in filled:
                value = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
                dist.broadcast(value, 0)
                filled[tensor] = nn.Parameter(value, tensor.requires_grad) if name in owner._parameters else value
            setattr(owner, name, filled[tensor])


def _units(policy: nn.Module) -> list[Any]:
    """The sharded modules; none of a policy that is whole."""
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def reshard(policy: nn.Module) -> None:
    """Give up whole weights that a forward without backward has left. No collective."""
    for unit in _units(policy):
        unit.reshard()


@contextmanager
def gathered(policy: Any) -> Iterator[None]:
    """Whole weights (in the compute dtype) in every process, for generation: forwards inside make no collective.

    Entered by all processes together. The whole model is in memory for that time. Nothing where nothing is sharded.
    """
    units = _units(policy)

    def gather() -> None:
        for unit in units:
            unit.unshard()

    if units:
        policy.run(gather)  # a forward of the policy comes first: it makes the policy the root
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not policy, recurse=False)
            unit.reshard()


def missing(policy: nn.Module, count: int, device: torch.device) -> int:
    """Forwards that a process with ``count`` of them makes for the others' sake; 0 where nothing is sharded.

    A collective, asked before the first of these forwards: after them, it would meet other processes' gathering.
    """
    if not isinstance(policy, FSDPModule):
        return 0
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest) - count


def idle_group(group: Group, token: int) -> Group:
    """A prompt of one text token and a response of one, with advantage 0, in the form of ``group``."""
    one, row = torch.full((1,), token), torch.zeros(1, 1)
    types = None if group.prompt.token_types is None else torch.zeros_like(one)
    return Group(
        prompt=Prompt(group.prompt.record, one, types, frame_ids=torch.full((1,), -1, dtype=torch.int32)),
        completion_ids=one[None],
        mask=row == 0,
        rollout_logprobs=row,
        finished=row[0] == 0,
        texts=[""],
        rewards=row[0],
        accuracy=row[0],
        rewards_by_name={},
        advantages=row[0],
    )


def no_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A head whose backward reaches every trained parameter with gradient 0."""
    return 0.0 * (hidden.sum() + weight[0].sum() + (0.0 if bias is None else bias.sum()))


def own(value: Any) -> Tensor:
    """The shard of a tensor that this process has; all of one that is not sharded."""
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local


def sum_over_shards(value: Tensor, parameter: Tensor) -> None:
    """Add up ``value``, in place, over the processes that have shards of ``parameter``; nothing where it is whole."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        dist.all_reduce(value, group=mesh.get_group(mesh.ndim - 1))


def full_weights(policy: Policy) -> dict[str, Tensor] | None:
    """State dict of ``policy.model`` for ``save_pretrained``: whole, on the CPU of the first process; {} in the others.

    Collective. With adapters those alone; a tied weight once. None where nothing is sharded: the model has its own.
    """
    if not isinstance(policy, FSDPModule):
        return None
    reshard(policy)
    adapters = hasattr(policy.model, "peft_config")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters)
    state = get_model_state_dict(policy, options=options)
    once = {name for name, _ in (*policy.named_parameters(), *policy.named_buffers())}
    return {name.removeprefix("model."): value for name, value in state.items() if name in once}
