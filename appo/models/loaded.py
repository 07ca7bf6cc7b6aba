"""Properties of a loaded transformers model: positions of its prompts, its vision tokens, its end tokens."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from appo.constraints import ConfigError


def prompt_positions(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Positions of left-padded prompts: (3, P, L) with multimodal rotary positions, else (P, L). int64; fp32 where the
    model counts parts of a second."""
    base = unwrapped(model).base_model
    if hasattr(base, "get_rope_index"):
        accepted = inspect.signature(base.get_rope_index).parameters
        given = {_ROPE_NAMES.get(name, name): value for name, value in inputs.items()}
        if "mm_token_type_ids" in given or "mm_token_type_ids" not in accepted:
            return base.get_rope_index(**{name: value for name, value in given.items() if name in accepted})[0]
    return (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)


# Processor outputs that `get_rope_index` takes under another name
_ROPE_NAMES = {"video_second_per_grid": "second_per_grids"}


def check_head(model: Any) -> None:
    """Raise ConfigError for adapters on the language-model head, of which operators would read the weight alone."""
    if hasattr(unwrapped(model).get_output_embeddings(), "base_layer"):
        raise ConfigError(
            "`lora_targets`: expected modules before the language-model head, got adapters on the head as well, which "
            "log-probabilities out of hidden states would leave out. Take it out of the targets."
        )


def vision_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that stand for pixels or sound in a prompt (video, image, vision, audio tokens): none may occur in a
    response."""
    config = unwrapped(model).config
    names = {*vars(config), *getattr(config, "attribute_map", {})}
    media = ("image_", "video_", "vision_", "audio_")
    found = {getattr(config, name) for name in names if name.startswith(media) and name.endswith("_token_id")}
    parts = ("vision", "_pad|", "audio_")
    special = {token for token in tokenizer.get_added_vocab() if any(part in token for part in parts)}
    found.update(tokenizer.convert_tokens_to_ids(token) for token in special)
    return sorted(i for i in found if i is not None and i not in end_ids(model, tokenizer))


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return sorted({*ids, tokenizer.eos_token_id})


def cache_argument(model: Any) -> str:
    """Name under which the model's forward takes a KV cache: "cache" since transformers 5.24, "past_key_values" before.

    Raises ValueError for a forward that takes neither.
    """
    forward = unwrapped(model).forward
    accepted = inspect.signature(forward).parameters
    for name in ("cache", "past_key_values"):
        if name in accepted:
            return name
    raise ValueError(
        f"model: expected a forward that takes a KV cache as `cache` or `past_key_values`, got "
        f"{type(unwrapped(model)).__name__}, which takes {', '.join(accepted)}. Use a model of transformers."
    )


def enable_checkpointing(model: Any, *, reentrant: bool = False, every: int = 1, offload: bool = False) -> None:
    """Compute the activations of layers again in the backward; the method has another name since transformers 5.24.

    every: of every n-th layer of the text model, and of the vision tower, from their first on; others keep theirs.
    offload: what such a layer keeps, the hidden states that it reads, waits in the host's memory.

    Raises ConfigError for a model whose layers transformers does not checkpoint, or has fewer of.
    """
    plain = unwrapped(model)
    if not plain.supports_gradient_checkpointing:
        raise ConfigError(
            "`gradient_checkpointing`: expected a model whose layers transformers can compute again, got "
            f"{type(plain).__name__}. Set it to false."
        )
    _either(model, "activation_checkpointing_enable", "gradient_checkpointing_enable")({"use_reentrant": reentrant})
    if every == 1 and not offload:
        return
    text_layers = max(map(len, _checkpointed_stacks(plain.get_decoder())), default=0)
    if text_layers < every or not text_layers:
        name, value = ("checkpoint_every", every) if every > 1 else ("checkpoint_offload", offload)
        raise ConfigError(
            f"`{name}`: expected at most the layers that transformers checkpoints one by one, {text_layers} in the "
            f"text model of {type(plain).__name__}, got {value}. Lower it, or leave it out."
        )
    for stack in _checkpointed_stacks(model):
        for index, layer in enumerate(stack):
            layer.gradient_checkpointing = index % every == 0
            if offload:
                layer._gradient_checkpointing_func = partial(_inputs_on_host, layer._gradient_checkpointing_func)


def _checkpointed_stacks(model: nn.Module) -> list[list[Any]]:
    """The lists of layers that transformers checkpoints one by one, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    stacks = [[layer for layer in found if isinstance(layer, GradientCheckpointingLayer)] for found in lists]
    return [stack for stack in stacks if stack]


def _inputs_on_host(checkpoint: Callable[..., Any], layer: Callable[..., Any], *inputs: Any) -> Any:
    """``checkpoint(layer, *inputs)`` whose inputs are copied to the host, and back for the backward."""
    kept = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not kept:  # of a frozen tower
        return checkpoint(layer, *inputs)
    with save_on_cpu(pin_memory=kept[0].is_cuda):
        return checkpoint(layer, *inputs)


def disable_checkpointing(model: Any) -> None:
    _either(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()


def _either(model: Any, new: str, old: str) -> Callable[..., None]:
    found: Callable[..., None] = getattr(model, new if hasattr(model, new) else old)
    return found


def unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# torch's attention with a mask is silently wrong on CUDA beyond this many tokens.
MOST_MASKED_TOKENS = 65_536


def refuse_dense_mask(
    model: Any,
    attention_mask: Tensor,
    device_type: str | None = None,
    remedy: str = "Use a model that allows share_prompt: on, or flash attention.",
) -> None:
    """Refuse a batch (B, L) for which attention would need a dense L x L mask that CUDA computes wrongly.

    Padding needs one, and so do layers with a sliding window.

    remedy: the advice that ends the message, where it is for padding.

    Raises ValueError beyond 65,536 tokens on CUDA with an implementation that takes such a mask.
    """
    config, length = unwrapped(model).config.get_text_config(), attention_mask.shape[-1]
    name = config._attn_implementation
    if length <= MOST_MASKED_TOKENS or (device_type or attention_mask.device.type) != "cuda" or "flash" in str(name):
        return
    windowed = any(kind.startswith(("sliding", "chunked")) for kind in getattr(config, "layer_types", None) or [])
    if windowed or not bool(attention_mask.all()):
        without, got = ("windows", "layers with windows in a") if windowed else ("padding", "a padded")
        raise ValueError(
            f"`share_prompt`: expected rows without {without} beyond {MOST_MASKED_TOKENS:,} tokens on CUDA, got {got} "
            f"batch of {length:,} tokens with attention {name!r}: torch's attention with a mask is wrong there. "
            + ("Lower `max_frames`." if windowed else remedy)
        )
