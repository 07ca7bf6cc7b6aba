"""transformers' attention implementation "appo": groups of responses behind one prompt in one row, without a mask.

    register_attention()
    model = AutoModelForImageTextToText.from_pretrained(name, attn_implementation={"text_config": "appo"})
    model(input_ids, attention_mask=packed_mask(device), group_layout=layout, position_ids=..., use_cache=False)

The layout is a keyword argument of the forward, which transformers hands to every layer, so that a layer that gradient
checkpointing computes again gets it again, in whatever thread. In the mask's place stands an empty tensor: transformers
hands 4-D masks on as they are, other implementations fail on its shape, and this one fails when either comes without
the other. A forward without a layout (generation, evaluation) is that of "sdpa".
"""

from typing import Any

import torch
from torch import Tensor, nn

from appo.models.prompt_cache import PromptCache
from appo.recording.hooks import attention_modules
from appo_kernels import GroupLayout, checks, group_attention

NAME = "appo"
_PACKED_SHAPE = (1, 1, 0, 0)
# Arguments of a layer's attention that change what it computes, where they are neither None, 0 nor False
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "dropout")


def packed_mask(device: torch.device | str) -> Tensor:
    """The stand-in for the attention mask when a forward is given a ``group_layout``."""
    return torch.empty(_PACKED_SHAPE, device=device)


def register_attention() -> None:
    """Make ``attn_implementation="appo"`` known to transformers, with its mask function; more than once is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, appo_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use_packed_attention(model: Any) -> None:
    """Give the text layers of a transformers model (without adapters around it) this implementation; a vision tower
    keeps its own.

    Raises ValueError, naming the layers, for a model that `cannot_pack`.
    """
    reason = cannot_pack(model)
    if reason is not None:
        checks.fail(NAME, "model", "text layers of full causal attention", reason, "Train it with share_prompt: off.")
    register_attention()
    has_text_config = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config": NAME} if has_text_config else NAME)


def cannot_pack(model: Any) -> str | None:
    """The reason that the text layers of a model cannot attend in packed groups, naming them; None when they can."""
    config = model.config.get_text_config()
    attending = attention_modules(model.get_decoder())
    missing = [number for number in range(config.num_hidden_layers) if number not in attending]
    if missing:
        return f"layers {missing} do not attend through transformers' attention interface (linear attention?)"
    kinds = getattr(config, "layer_types", None)
    for number, kind in enumerate(kinds or []):
        if kind != "full_attention":
            return f"layer {number} is of the kind {kind}"
    if kinds is None and getattr(config, "sliding_window", None) is not None and _uses_window(config):
        return f"every layer has a sliding window of {config.sliding_window}"
    if getattr(config, "attn_logit_softcapping", None):
        return f"every layer has soft caps of {config.attn_logit_softcapping}"
    for number, module in attending.items():
        if getattr(module, "sliding_window", None) is not None:
            return f"layer {number} has a sliding window of {module.sliding_window}"
        if getattr(module, "sinks", None) is not None:
            return f"layer {number} has attention sinks"
        if not getattr(module, "is_causal", True):
            return f"layer {number} is not causal"
    return None


def _uses_window(config: Any) -> bool:
    """Some configs give a window beside a switch that turns it off."""
    return bool(getattr(config, "use_sliding_window", True))


def appo_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    group_layout: GroupLayout | None = None,
    prompt_cache: PromptCache | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a layer: output (1, T, Hq, d) and, where others return weights, lse (1, Hq, T) fp32.

    With a ``prompt_cache`` in the layout's place, that of the last token of B responses: (B, 1, Hq, d).
    """
    packed = attention_mask is not None and tuple(attention_mask.shape) == _PACKED_SHAPE
    if (group_layout is not None or prompt_cache is not None) != packed:
        expected, got = ("group_layout", "a packed mask alone") if packed else ("a packed mask", "group_layout alone")
        remedy = "Pass both to the model, attention_mask=packed_mask(device); a model that drops one cannot be packed."
        checks.fail(NAME, "attention_mask", f"{expected} as well, in layer {_number(module)}", got, remedy)
    if not packed:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    changed = [name for name in _UNSUPPORTED if options.get(name)]
    if changed or not getattr(module, "is_causal", True):
        got = ", ".join(changed) or "attention that is not causal"
        checks.fail(
            NAME, "model", "full causal attention", f"{got} in layer {_number(module)}", "Use share_prompt: off."
        )
    if prompt_cache is not None:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        return prompt_cache.attend(_number(module), query, key, value, scale).to(value.dtype).transpose(1, 2), None
    assert group_layout is not None
    query, key, value = narrowed(query, key, value)
    out, lse = group_attention(query, key, value, group_layout, scale=options.get("scaling"))
    return out.transpose(1, 2), lse


def narrowed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype that autocast computes attention in: rotary embeddings widen query and key, and autocast narrows the
    arguments of torch's own attention only."""
    dtype = attention_dtype(tensors[0])
    return tuple(tensor.to(dtype) for tensor in tensors)


def attention_dtype(query: Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def shares_prompts(model: Any) -> bool:
    """Whether the text layers of a transformers model (without adapters around it) have this implementation."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def _number(module: nn.Module) -> Any:
    return getattr(module, "layer_idx", "?")
