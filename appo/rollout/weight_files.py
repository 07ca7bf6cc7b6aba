"""The weights of a model in training as a folder of safetensors that an inference engine loads."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from appo.rollout.vllm_worker import Checksum

SHARD_BYTES = 2 << 30


def weights_of(model: Any, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each weight as `transformers` saves it, one at a time: adapters are added in, a sharded
    weight is gathered when its turn comes. Every process iterates, in the same order.

    dtype: of floating-point weights; None: as they are.
    """
    adapted = _adapted(model)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen: set[int] = set()
    for name, parameter in plain.named_parameters():
        if ".lora_" in name or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        tensor = _whole(parameter.detach())
        if layer := adapted.get(name):
            tensor = tensor + _delta(layer).to(tensor)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        yield name.replace(".base_layer.", "."), tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _adapted(model: Any) -> dict[str, Any]:
    """Name of a weight that peft wraps -> its layer."""
    if not hasattr(model, "get_base_model"):
        return {}
    from peft.tuners.lora import LoraLayer

    plain = model.get_base_model()
    return {f"{name}.base_layer.weight": layer for name, layer in plain.named_modules() if isinstance(layer, LoraLayer)}


def _delta(layer: Any) -> Tensor:
    """The sum that the active adapters of a layer add to its weight: the sum of scaling * B A."""
    total: Any = 0
    for adapter in layer.active_adapters:
        if getattr(layer, "use_dora", {}).get(adapter):
            raise ValueError("engine: DoRA weights cannot be handed to another engine yet. Set `use_dora: false`.")
        if adapter not in layer.lora_A:
            raise ValueError(f"engine: adapters on a {type(layer).__name__} cannot be handed to another engine.")
        a, b = _whole(layer.lora_A[adapter].weight.detach()), _whole(layer.lora_B[adapter].weight.detach())
        total = total + layer.scaling[adapter] * (b @ a)
    return total


def write_weights(
    model: nn.Module, folder: Path, *, dtype: torch.dtype | None = None, write: bool = True
) -> tuple[int, int]:
    """Write the weights of ``model`` into ``folder``, which holds them alone and whole when this returns.

    Every process calls it (sharded weights are gathered one by one); the one with ``write`` keeps at most
    `SHARD_BYTES` of them at a time and writes. Returns the checksum (sum of bit patterns, number of weights).
    """
    sums, shard, size, files = Checksum(), dict[str, Tensor](), 0, list[str]()
    partial = folder.with_name(folder.name + ".partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def flush() -> None:
        nonlocal shard, size
        if shard:
            files.append(f"model-{len(files):05d}.safetensors")
            save_file(shard, partial / files[-1], metadata={"format": "pt"})
        shard, size = {}, 0

    for name, tensor in weights_of(model, dtype):
        if not write:
            continue
        sums.add(tensor)
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            flush()
    if write:
        flush()
        (partial / "checksum.json").write_text(json.dumps({"sum": sums.total, "count": sums.count}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return sums.total, sums.count
