"""Frame attention mass out of a transformers model's own forward, whatever attention it uses.

    with record_frame_mass(model, frames, rows=response_rows(P, N)) as recorder:
        logits = model(**inputs).logits
    recorder.mass  # (B, N, F)

While the context is open, each tapped attention layer calls the implementation that the model has (sdpa, eager, flash,
any registered one) with the arguments it always gets, and then hands query and key to ``frame_mass``. The model's
config, its masks and all other layers are untouched, and the output is bitwise that of the model alone.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from appo.recording.arguments import check_frame_ids, check_rows
from appo.recording.frame_ids import FrameIds
from appo.recording.hooks import OP, AttentionCall, attention_layers, tap_module, untap_module
from appo.recording.mask_bounds import visible_keys
from appo_kernels import FramePlan, checks, frame_mass

# Arguments that change the softmax itself: with one of them the mass would not be the layer's.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache", "block_table")


def record_frame_mass(
    model: nn.Module,
    frame_ids: FrameIds | Tensor,
    *,
    rows: slice | Tensor,
    layers: int | Sequence[int] = 3,
    reduction: str = "mean",
    gradient: bool = False,
) -> "FrameMassRecorder":
    """Context manager that records the frame attention mass (docs/method.md section 3) of every forward of ``model``.

    Args:
        model: a transformers model whose text layers attend through transformers' attention interface; bare, or inside
            PEFT, accelerate, DistributedDataParallel, or any other wrapper module.
        frame_ids: ``FrameIds`` of the whole sequences, or (B, S) int frame of each token, -1 for none; F is the largest
            number of frames in the batch.
        rows: query positions to record: a slice, the same for all sequences, or (B, R) int. Positions are those of
            ``frame_ids``, padding counted; with a KV cache as well, where only the last L of S positions (those that
            the forward computes) can be recorded. ``response_rows(P, N)`` gives those of N response tokens after a
            prompt padded to P.
        layers: the last n layers that have attention (linear-attention layers do not count), or a list of layer numbers
            (negative ones count from the end of the decoder).
        reduction: "mean" over the keys of a frame, or "sum".
        gradient: the mass keeps its gradient, which reaches whatever the tapped layers' queries and keys depend on. It
            is computed once, when the forward ends: under gradient checkpointing (the kind with use_reentrant=False)
            layers that are computed again do not record again, and the context may be left before the backward.

    Returns:
        The recorder; ``recorder.mass`` is (B, R, F) fp32, the mean over query heads and tapped layers, detached unless
        ``gradient``, of the last forward (each forward starts anew; a recomputation under gradient checkpointing
        changes nothing).
        A row that sees no key, and a frame without keys, have exactly 0. Attention dropout is left out of account.
        The recorder can be entered again, and within other recorders of the same model.

    Raises:
        ValueError: here, for arguments that do not fit the model; in the forward, for keys that do not fit
            ``frame_ids``, a mask that is no interval per row (bidirectional blocks, biases), soft caps and sinks; with
            ``gradient``, for a forward in which no tapped layer's query or key carries one.
        RuntimeError: at ``.mass``, before a forward has passed the tapped layers.

    Compiled models can be recorded as well; the tapped layers break the graph.
    """
    return FrameMassRecorder(model, frame_ids, rows, layers, reduction, gradient)


class FrameMassRecorder:
    """See ``record_frame_mass``."""

    def __init__(
        self,
        model: nn.Module,
        frame_ids: FrameIds | Tensor,
        rows: slice | Tensor,
        layers: int | Sequence[int],
        reduction: str,
        gradient: bool = False,
    ) -> None:
        if reduction not in ("mean", "sum"):
            checks.fail(OP, "reduction", '"mean" or "sum"', repr(reduction), "Pass one of these.")
        checks.flag(OP, "gradient", gradient)
        self._frame_ids, self._num_frames = check_frame_ids(frame_ids)
        self._rows = check_rows(rows, *self._frame_ids.shape)
        self._decoder, self._layers = attention_layers(model, layers)
        self._reduction, self._gradient = reduction, gradient
        # With a gradient, what was recorded waits for the end of the forward: (query, key, their operands) by layer.
        # Inside a checkpointed layer, frame_mass would save tensors that a recomputation had to save again.
        self._waiting: list[tuple[int, Tensor, Tensor, dict[str, Any]]] = []
        self._hooks: list[Any] = []
        self._depth = 0  # how often the context is open
        self._in_forward = False
        self._total: Tensor | None = None  # (B, R, F): sum over the layers recorded so far; fp64 in fp64 models
        self._recorded: list[int] = []  # their numbers, once for each pass (some models run a layer several times)
        # Layers share a mask tensor or layout, and with it a plan: by its id and the window, and it itself
        self._plans: dict[tuple[int, Any], tuple[Any, FramePlan]] = {}

    @property
    def layers(self) -> list[int]:
        """Numbers of the tapped layers, ascending."""
        return sorted(self._layers)

    @property
    def mass(self) -> Tensor:
        """(B, R, F) fp32 mass of the last forward, mean over heads and tapped layers; detached unless ``gradient``."""
        missing = [layer for layer in self.layers if layer not in self._recorded]
        if self._total is None or missing:
            raise RuntimeError(
                f"{OP}: `mass`: expected a forward through the tapped layers {self.layers}, got none through "
                f"{missing}. Call the model itself, not a copy, inside the context, and read `mass` after it."
            )
        return (self._total / len(self._recorded)).float()

    def __enter__(self) -> "FrameMassRecorder":
        self._depth += 1
        if self._depth > 1:
            return self
        self._reset()
        try:
            for number, module in self._layers.items():
                tap_module(module, self, number)
            # A forward is what happens between these hooks; checkpointed layers are recomputed outside of them.
            self._hooks.append(self._decoder.register_forward_pre_hook(self._begin_forward, with_kwargs=True))
            self._hooks.append(self._decoder.register_forward_hook(self._end_forward, always_call=True))
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._close()

    def _close(self) -> None:
        self._depth, self._in_forward, self._plans, self._waiting = 0, False, {}, []
        for module in self._layers.values():
            untap_module(module, self)
        while self._hooks:
            self._hooks.pop().remove()

    def _reset(self) -> None:
        self._total, self._recorded, self._plans, self._waiting = None, [], {}, []

    def _begin_forward(self, decoder: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        self._reset()
        # Known by what it is: transformers has renamed the argument, and a caller may pass it by place.
        for cache in (*arguments, *keywords.values()):
            if getattr(cache, "is_compileable", False):
                checks.fail(
                    OP,
                    "model",
                    "a forward without a KV cache, or with one that grows with the sequence",
                    type(cache).__name__,
                    "Its keys hold unwritten places; pass a DynamicCache.",
                )
        self._in_forward = True

    def _end_forward(self, decoder: nn.Module, arguments: Any, output: Any) -> None:
        if output is not None:  # None: it raised
            self._add_waiting()
        self._in_forward, self._plans, self._waiting = False, {}, []

    def record(self, layer: int, call: AttentionCall) -> None:
        """Adds the mass of one call of a tapped layer."""
        if not self._in_forward:
            return
        query, key, lse = call.query, call.key, call.lse
        for name in UNSUPPORTED:
            if call.options.get(name) is not None:
                checks.fail(OP, "layers", f"attention without `{name}`", f"layer {layer} with it", "Tap other layers.")
        batch, length = self._frame_ids.shape
        if (key.shape[0], key.shape[2]) != (batch, length):
            checks.fail(
                OP,
                "frame_ids",
                f"shape (B, S) = {(key.shape[0], key.shape[2])}, the keys of layer {layer}",
                f"shape {(batch, length)}",
                "Pass the frames of the whole sequences: prompt and response, cached tokens and padding included.",
            )
        self._move_to(query.device)
        first_row = length - query.shape[2]  # position of the forward's first query
        if self._rows.lowest < first_row:
            checks.fail(
                OP,
                "rows",
                f"positions {first_row} to {length - 1}, which this forward computes",
                self._rows.lowest,
                "Positions before these are in the KV cache; record the forward that computed them.",
            )
        if call.options.get("group_layout") is not None and lse is None:
            remedy = 'Use attn_implementation "appo" for the text layers.'
            checks.fail(OP, "model", "attention that returns the lse of a packed row", f"none in layer {layer}", remedy)
        operands = {
            "plan": self._plan_of(call),
            "lse": None if lse is None else self._rows.of(lse[..., None], first_row)[..., 0],
            "scale": call.options.get("scaling"),
        }
        if self._gradient:
            self._waiting.append((layer, query, key, operands | {"first_row": first_row}))
            return
        query, key = query.detach(), key.detach().to(query.dtype)
        self._add(layer, self._rows.of(query, first_row), key, **operands)
        self._recorded.append(layer)

    def _add_waiting(self) -> None:
        """Adds the mass of a forward's layers with its gradient, outside of whatever is computed again."""
        if not self._waiting:
            return
        if not (torch.is_grad_enabled() and any(q.requires_grad or k.requires_grad for _, q, k, _ in self._waiting)):
            remedy = (
                "Open it around a forward outside of torch.no_grad() of a model with something to train before them, "
                "checkpointed, if at all, with use_reentrant=False; or record with gradient=False."
            )
            expected = f"a gradient on query or key of a tapped layer, out of {self.layers}"
            checks.fail(OP, "gradient", expected, "none", remedy)
        for layer, query, key, operands in self._waiting:
            self._move_to(query.device)
            with torch.autocast(query.device.type, enabled=False):
                rows = self._rows.of(query, operands.pop("first_row"))
                self._add(layer, rows, key.to(query.dtype), **operands)
            self._recorded.append(layer)

    def _add(self, layer: int, query: Tensor, key: Tensor, **operands: Any) -> None:
        """Adds the mass of the rows of one layer to the total."""
        if self._total is None:
            dtype = torch.promote_types(query.dtype, torch.float32)
            shape = (*self._rows.positions.shape, self._num_frames)
            self._total = torch.zeros(shape, dtype=dtype, device=query.device)
        frame_mass(query, key, **operands, reduction=self._reduction, out=self._total)

    def _move_to(self, device: torch.device) -> None:
        """Layers of one model may lie on several devices; the recorder follows them."""
        if self._frame_ids.device != device or self._rows.positions.device != device:  # rows of a slice: the host's
            self._frame_ids, self._rows.positions = self._frame_ids.to(device), self._rows.positions.to(device)
            self._plans = {}
        if self._total is not None and self._total.device != device:
            self._total = self._total.to(device)

    def _plan_of(self, call: AttentionCall) -> FramePlan:
        """Frames and visibility of the rows to record, worked out once for the layers that share a mask or layout."""
        layout, window = call.options.get("group_layout"), call.options.get("sliding_window")
        shared = call.mask if layout is None else layout
        if (known := self._plans.get((id(shared), window))) is not None:
            return known[1]
        if layout is not None:
            plan = FramePlan.of_layout(self._frame_ids, self._num_frames, layout, rows=self._rows.on_host)
        else:
            seen = visible_keys(self._rows.positions, call)
            plan = FramePlan.build(self._frame_ids, self._num_frames, **seen._asdict())
        self._plans[id(shared), window] = shared, plan
        return plan
