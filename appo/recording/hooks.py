"""Hooks that hand the query and key of chosen attention layers to a recorder, and leave no trace.

Attention modules ask their config for the name of the implementation, and transformers' attention interface for its
function. A tapped module has a copy of its config that names ``recording_attention``, which calls the implementation
that the model's own config names, with the same arguments, and then tells the listeners.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from appo_kernels import checks

OP = "record_frame_mass"
NAME = "appo_frame_mass"


class AttentionCall(NamedTuple):
    """One call of a tapped layer's attention function: its arguments, and what it returned beside its output."""

    query: Tensor  # (B, Hq, L, d), of the last L of the S positions
    key: Tensor  # (B, Hkv, S, d)
    mask: Any  # None, (B, S) padding (flash attention), or a boolean or additive (1 or B, 1 or Hq, L, S)
    implementation: str | None  # name of the attention function; None: eager
    is_causal: bool  # of the layer, where the mask does not say
    options: dict[str, Any]  # other keyword arguments: scaling, sliding_window, position_ids, cu_seq_lens_k, ...
    lse: Tensor | None = None  # (B, Hq, L) over all keys that the rows see, where it was returned


class Listener(Protocol):
    def record(self, layer: int, call: AttentionCall) -> None: ...


class Tap:
    """A tapped attention module: its own config, the one it has meanwhile, and its listeners."""

    def __init__(self, module: Any) -> None:
        names = _forward_of(module).__globals__
        self.interface: Any = names["ALL_ATTENTION_FUNCTIONS"]
        self.eager: Callable[..., Any] | None = names.get("eager_attention_forward")
        self.config = module.config
        self.tapped_config = copy.deepcopy(self.config)
        self.tapped_config._attn_implementation = NAME
        self.listeners: dict[Listener, int] = {}  # and the number of the layer

    def function(self) -> Callable[..., Any]:
        """The attention function the model would call without us; asked at each call, since it may be set meanwhile."""
        name = self.config._attn_implementation
        function = self.eager if name in (None, "eager") else self.interface.get(name)
        if function is None:
            raise ValueError(
                f"{OP}: `model`: expected a registered attention implementation, got {name!r}. "
                'Set one with model.set_attn_implementation("sdpa").'
            )
        return function


_TAPS: dict[nn.Module, Tap] = {}


def tap_module(module: nn.Module, listener: Listener, layer: int) -> None:
    tap = _TAPS.get(module)
    if tap is None:
        tap = _TAPS[module] = Tap(module)
        tap.interface[NAME] = recording_attention
        module.config = tap.tapped_config
    tap.listeners[listener] = layer


def untap_module(module: nn.Module, listener: Listener) -> None:
    """Takes the listener off the module, in any order; after the last one, everything is as it was."""
    tap = _TAPS.get(module)
    if tap is None or tap.listeners.pop(listener, None) is None or tap.listeners:
        return
    module.config = tap.config
    del _TAPS[module]
    if all(other.interface is not tap.interface for other in _TAPS.values()):
        del tap.interface[NAME]


@torch.compiler.disable
def recording_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **options: Any
) -> Any:
    """The attention function of tapped layers: the model's own, and then the listeners."""
    tap = _TAPS[module]
    module.config = tap.config  # flash attention reads the implementation's name there
    try:
        result = tap.function()(module, query, key, value, attention_mask, *args, **options)
    finally:
        module.config = tap.tapped_config
    lse = _lse(result, query)
    if lse is not None and torch.is_autocast_enabled(query.device.type):  # it is that of what autocast narrowed
        query, key = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key))
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    call = AttentionCall(query, key, attention_mask, tap.config._attn_implementation, causal, options, lse)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        for listener, layer in tap.listeners.items():
            listener.record(layer, call)
    return result


def _lse(result: Any, query: Tensor) -> Tensor | None:
    """(B, Hq, L) fp32 log-sum-exp, from implementations that return it where others return (B, Hq, L, S) weights."""
    second = result[1] if isinstance(result, tuple) and len(result) > 1 else None
    if (
        isinstance(second, Tensor)
        and second.shape == query.shape[:3]
        and second.dtype in (torch.float32, torch.float64)
    ):
        return second.detach()
    return None


def _forward_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _attends(module: nn.Module) -> bool:
    """True for a decoder layer's attention that goes through the attention interface."""
    code = getattr(_forward_of(module), "__code__", None)
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and code is not None
        and "ALL_ATTENTION_FUNCTIONS" in code.co_names
    )


def attention_modules(decoder: nn.Module) -> dict[int, Any]:
    """The attention modules of a decoder that go through the attention interface, by number of their layer."""
    return {int(module.layer_idx): module for module in decoder.modules() if _attends(module)}  # type: ignore[arg-type]


def check_attention(model: nn.Module, layers: int | Sequence[int]) -> None:
    """Raise ValueError for a model whose layers cannot be recorded, before any forward of it."""
    for module in attention_layers(model, layers)[1].values():
        Tap(module).function()


def attention_layers(model: nn.Module, layers: int | Sequence[int]) -> tuple[nn.Module, dict[int, nn.Module]]:
    """The text decoder inside any wrapper, and its chosen attention modules by layer number."""
    from transformers import PreTrainedModel

    modules = model.modules() if isinstance(model, nn.Module) else ()
    base = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if base is None:
        checks.fail(
            OP, "model", "a transformers model, or a module around one", type(model).__name__, "Pass such a model."
        )
    decoder = base.get_decoder()
    found = attention_modules(decoder)
    if not found:
        checks.fail(
            OP,
            "model",
            "decoder layers that attend through transformers' attention interface",
            f"{type(decoder).__name__}, which has none",
            "Linear-attention layers have no attention weights; old custom code has to be ported to the interface.",
        )
    available = sorted(found)
    if isinstance(layers, int):
        if not 1 <= layers <= len(available):
            checks.fail(
                OP, "layers", f"1 to {len(available)}, or a list out of {available}", layers, "Pass fewer layers."
            )
        return decoder, {number: found[number] for number in available[-layers:]}
    depth = len(getattr(decoder, "layers", available))
    chosen = {number + depth if number < 0 else number for number in layers}
    if not chosen or len(chosen) != len(layers) or not chosen <= set(available):
        checks.fail(
            OP, "layers", f"distinct layers with attention, out of {available}", list(layers), "Choose from these."
        )
    return decoder, {number: found[number] for number in sorted(chosen)}


def last_layers(model: nn.Module, count: int) -> list[int]:
    """Numbers of the last ``count`` layers that attend to the whole sequence: in a model of both kinds, one with a
    sliding window says nothing of the frames before it. Where all have a window, the last of them.

    Raises ValueError, as `attention_layers`, for a model with fewer.
    """
    decoder, _ = attention_layers(model, 1)
    found = attention_modules(decoder)
    whole = [number for number in sorted(found) if getattr(found[number], "sliding_window", None) is None]
    whole = whole or sorted(found)
    if not 1 <= count <= len(whole):
        checks.fail(OP, "layers", f"1 to {len(whole)} layers that see all frames", count, "Pass fewer layers.")
    return whole[-count:]
