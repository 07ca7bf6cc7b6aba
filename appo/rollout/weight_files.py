"""The weights of a model in training as a folder of safetensors that an inference engine loads."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from appo.models.loaded import unwrapped
from appo.rollout.vllm_extension import Checksum

SHARD_BYTES = 2 << 30


def weights_of(model: Any, dtype: torch.dtype | None = None, *, adapters: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each weight as `transformers` saves it, one at a time; a sharded weight is gathered when
    its turn comes. Every process iterates, in the same order.

    dtype: of floating-point weights; None: as they are. adapters: whether they are added in.
    """
    adapted = _adapted(model) if adapters else {}
    for name, parameter in _parameters(model):
        tensor = _whole(parameter.detach())
        if layer := adapted.get(name):
            tensor = _with_adapters(tensor, layer)
        yield _saved_name(name), tensor.to(_dtype(tensor, dtype))


def described_weights(model: Any, dtype: torch.dtype | None = None) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, whole shape) of each of ``weights_of``, in its order; nothing is gathered."""
    return [(_saved_name(name), _dtype(tensor, dtype), tuple(tensor.shape)) for name, tensor in _parameters(model)]


def _parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Each parameter once, without those of adapters."""
    seen: set[int] = set()
    for name, parameter in unwrapped(model).named_parameters():
        if ".lora_" not in name and id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _saved_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _adapted(model: Any) -> dict[str, Any]:
    """Name of a weight that peft wraps -> its layer."""
    if not hasattr(model, "get_base_model"):
        return {}
    from peft.tuners.lora import LoraLayer

    plain = model.get_base_model()
    return {f"{name}.base_layer.weight": layer for name, layer in plain.named_modules() if isinstance(layer, LoraLayer)}


def _with_adapters(weight: Tensor, layer: Any) -> Tensor:
    """``weight`` (out, in) with a layer's active adapters: + scaling B A each, and with DoRA the trained norm of each
    row instead of its own (Liu et al. 2024, eq. 5)."""
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A or weight.dim() != 2:
            raise ValueError(f"engine: adapters on a {type(layer).__name__} cannot be handed to another engine.")
        a, b = _whole(layer.lora_A[adapter].weight.detach()), _whole(layer.lora_B[adapter].weight.detach())
        kind, weight = weight.dtype, weight.float() + layer.scaling[adapter] * (b.float() @ a.float())
        if layer.use_dora.get(adapter):
            norms = _whole(layer.lora_magnitude_vector[adapter].weight.detach()).float()
            weight = weight * (norms / weight.norm(dim=1))[:, None]
        weight = weight.to(kind)
    return weight


def adapters_of(model: Any, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each LoRA matrix as peft saves it. Every process iterates, in the same order."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            tensor = _whole(parameter.detach())
            yield name.replace(".default.", "."), tensor.to(_dtype(tensor, dtype))


def adapter_rank(model: Any) -> int:
    """The rank of a model's plain LoRA adapters, which an engine may take by themselves; 0 for all others."""
    configs = getattr(model, "peft_config", {})
    if list(configs) != ["default"] or configs["default"].use_dora or configs["default"].peft_type.value != "LORA":
        return 0
    return int(configs["default"].r)


def write_adapters(
    model: Any, folder: Path, *, dtype: torch.dtype | None = None, write: bool = True
) -> tuple[int, int]:
    """As ``write_weights``, of the adapters of a model alone, as `peft` saves them."""
    sums = _write(adapters_of(model, dtype), folder, write, "adapter_model.safetensors")
    if write:
        model.peft_config["default"].save_pretrained(folder)
    return sums


def write_weights(
    model: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    write: bool = True,
    adapters: bool = True,
) -> tuple[int, int]:
    """Write the weights of ``model`` into ``folder``, which holds them alone and whole when this returns.

    Every process calls it (sharded weights are gathered one by one); the one with ``write`` keeps at most
    `SHARD_BYTES` of them at a time and writes. Returns the checksum (sum of bit patterns, number of weights).
    """
    return _write(weights_of(model, dtype, adapters=adapters), folder, write)


def _write(weights: Iterator[tuple[str, Tensor]], folder: Path, write: bool, name_of_all: str = "") -> tuple[int, int]:
    """name_of_all: of the one file; "": as many files as are needed."""
    sums, shard, size, files = Checksum(), dict[str, Tensor](), 0, list[str]()
    partial = folder.with_name(folder.name + ".partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def flush() -> None:
        nonlocal shard, size
        if shard:
            files.append(name_of_all or f"model-{len(files):05d}.safetensors")
            save_file(shard, partial / files[-1], metadata={"format": "pt"})
        shard, size = {}, 0

    for name, tensor in weights:
        if not write:
            continue
        sums.add(tensor)
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        size += shard[name].nbytes
        if size >= SHARD_BYTES and not name_of_all:
            flush()
    if write:
        flush()
        (partial / "checksum.json").write_text(json.dumps({"sum": sums.total, "count": sums.count}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return sums.total, sums.count
