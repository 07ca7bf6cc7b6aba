"""Before the first step: loading the model, what of it is trained, the optimizer, the reference policy."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from appo.config import APPOConfig, ConfigError
from appo.models import liger
from appo.models.layouts import layout_of
from appo.models.load import check_attention, check_fits, from_pretrained, read_config, read_model, without_weights
from appo.models.loaded import enable_checkpointing, unwrapped
from appo.models.merge import CONFIG as ADAPTER_CONFIG
from appo.models.merge import base_model, has_processor
from appo.models.positions import use_positions
from appo.rollout.build import check_served
from appo.train.policy import Policy
from appo.train.sharding import loads_weights, place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the progress in [0, 1) behind the warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


def load_model(config: APPOConfig, *, trained: bool = True) -> tuple[nn.Module, Any]:
    """The model and processor of ``config.model``: a model, or a folder of LoRA adapters such as ``final/`` of a run.

    Trained weights are kept in fp32, since a learning rate of 1e-6 is lost in bf16; ``config.dtype`` is what the
    forward computes in. With LoRA, and where nothing is ``trained``, the model is loaded in that dtype. Adapters go on
    with ``lora_rank``, their own; without it they are merged into the model. Raises ConfigError.
    """
    from transformers import AutoProcessor

    if not config.model:
        raise ConfigError(
            "`model`: expected a folder or hub name, got nothing. For example Qwen/Qwen2.5-VL-7B-Instruct."
        )
    check_attention(config)
    folder = Path(config.model)
    adapters = folder if (folder / ADAPTER_CONFIG).is_file() else None
    name = config.model if adapters is None else base_model(adapters)
    if not name:
        raise ConfigError(
            f"`model`: {folder / ADAPTER_CONFIG}: expected the name of the model they belong to, got none."
        )
    model_config = read_config(name)
    layout_of(model_config)
    check_served(config, model_config)
    if trained and config.liger:
        liger.check(model_config.model_type)
    processor = from_pretrained(AutoProcessor, config.model if adapters is None or has_processor(adapters) else name)
    options = {
        "dtype": torch.float32 if trained and not config.lora_rank else DTYPES[config.dtype],
        "attn_implementation": config.attn_implementation,
    }
    model = without_weights(name, **options)
    check_fits(config, model, processor)  # before gigabytes are read
    if not trained or loads_weights(config):
        model = read_model(name, **options)
    use_positions(model, config.video_positions)
    return (model if adapters is None else _with_adapters(model, adapters, config)), processor


def _with_adapters(model: nn.Module, folder: Path, config: APPOConfig) -> nn.Module:
    """``model`` with the adapters of a folder to go on with; without ``lora_rank`` merged into it."""
    from peft import PeftModel

    rank = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("r")
    meta = any(parameter.is_meta for parameter in model.parameters())
    if meta and not config.lora_rank:
        return model  # the process that reads the weights merges them
    if config.lora_rank not in (0, rank):
        raise ConfigError(
            f"`lora_rank`: expected {rank}, that of the adapters in {folder}, got {config.lora_rank}. Take it, or make "
            "a model of them with appo merge first."
        )
    try:
        found: Any = PeftModel.from_pretrained(
            model, str(folder), is_trainable=bool(config.lora_rank), low_cpu_mem_usage=meta
        )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:  # peft's errors for adapters of another model
        raise ConfigError(f"`model`: {folder}: adapters that do not fit their model: {error}") from error
    return found if config.lora_rank else found.merge_and_unload().requires_grad_(True)  # peft has frozen it


def autocast(config: APPOConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Forwards compute in ``config.dtype``; weights that are trained stay in fp32."""
    dtype = DTYPES[config.dtype]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def prepare_model(model: Any, config: APPOConfig) -> nn.Module:
    """Freeze the vision tower, add LoRA adapters, gradient checkpointing and positions, as configured."""
    use_positions(model, config.video_positions)
    if config.liger:
        liger.use_liger(model)
    if not config.lora_rank and hasattr(model, "peft_config"):
        raise ConfigError(
            f"`lora_rank`: expected {model.peft_config['default'].r}, that of the model's adapters, got 0."
        )
    for part in vision_parts(model) * config.freeze_vision + audio_towers(model):
        part.requires_grad_(False)
    if config.gradient_checkpointing:
        enable_checkpointing(model, every=config.checkpoint_every, offload=config.checkpoint_offload)
    if config.lora_rank and not hasattr(model, "peft_config"):
        from peft import LoraConfig, get_peft_model

        towers = [part for part in vision_parts(model) + audio_towers(model) if isinstance(part, nn.Module)]
        outside = {id(module) for tower in towers for module in tower.modules()}
        targets = [
            name
            for name, module in model.named_modules()
            if name.rsplit(".", 1)[-1] in config.lora_targets and id(module) not in outside
        ]
        if not targets:
            raise ConfigError(f"`lora_targets`: expected names of modules of the model, got {config.lora_targets}.")
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets, use_dora=config.dora
        )
        with torch.random.fork_rng():  # adapters start at random: by the seed of the run
            torch.manual_seed(config.seed)
            model = get_peft_model(model, lora)
    if config.lora_rank:
        model.enable_input_require_grads()  # checkpointed blocks need an input that requires a gradient
    return model


def vision_parts(model: Any) -> list[nn.Module | nn.Parameter]:
    """The vision tower and what leads from it to the text model: all that is neither the text model nor hears."""
    plain = unwrapped(model)
    others = {id(part) for part in (plain.get_decoder(), plain.get_input_embeddings(), *audio_towers(model))}
    base = plain.base_model
    found = [part for part in (*base.children(), *base.parameters(recurse=False)) if id(part) not in others]
    if not found:
        raise ValueError(f"model: expected one with a vision tower beside its text model, got {type(plain).__name__}.")
    return found


def audio_towers(model: Any) -> list[nn.Module | nn.Parameter]:
    """The parts that hear, where a model has them: never trained, since no sound is read."""
    parts = (getattr(unwrapped(model).base_model, name, None) for name in ("audio_tower", "embed_audio"))
    return [part for part in parts if isinstance(part, nn.Module)]


def build_optimizer(policy: nn.Module, config: APPOConfig) -> torch.optim.Optimizer:
    """AdamW over what is trained; no weight decay on vectors (norms, biases)."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    arguments: Any = {
        "params": [group for group in groups if group["params"]],
        "lr": config.learning_rate,
        "betas": (0.9, config.adam_beta2),
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(**arguments, fused=True)  # no copies of the gradients at work
    from bitsandbytes import optim

    kinds = {"adamw_8bit": optim.AdamW8bit, "adamw_paged": optim.PagedAdamW, "adamw_paged_8bit": optim.PagedAdamW8bit}
    return cast(torch.optim.Optimizer, kinds[config.optimizer](**arguments))


def learning_rate(step: int, config: APPOConfig) -> float:
    """The rate of step 1 .. max_steps: linear warm-up, then constant, or down to 0 along a line or a cosine."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / (config.warmup_steps + 1)
    progress = (step - 1 - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * SCHEDULES[config.lr_schedule](progress)


def reference_policy(
    policy: Policy, config: APPOConfig, accelerator: Accelerator
) -> Callable[[], AbstractContextManager[nn.Module]] | None:
    """A context manager that gives the policy the run started from; None without a KL term.

    With LoRA it is the trained model with its adapters switched off; otherwise a frozen copy.
    """
    if config.beta == 0:
        return None
    if any("lora_B" in name and bool(p.any()) for name, p in policy.named_parameters()):
        raise ConfigError(
            "`beta`: expected 0 for a model with trained adapters: without them it is not the one the run starts from. "
            "Make a model of them with appo merge first."
        )
    frozen: nn.Module = policy
    if not config.lora_rank:
        frozen = place(copy.deepcopy(policy).eval().requires_grad_(False), config, accelerator, frozen=True)

    @contextmanager
    def reference() -> Iterator[nn.Module]:
        with policy.model.disable_adapter() if config.lora_rank else nullcontext():
            yield frozen

    return reference
