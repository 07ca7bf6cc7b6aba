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

from appo.recording.frame_ids import FrameIds
from appo.recording.hooks import OP, attention_layers, tap_module, untap_module
from appo.recording.mask_bounds import Visibility, visible_keys
from appo.recording.packed_rows import RowsOfGroup, rows_by_group
from appo_kernels import GroupLayout, checks, frame_mass

# Arguments that change the softmax itself: with one of them the mass would not be the layer's.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache", "block_table")


def response_rows(prompt_length: int, response_length: int) -> slice:
    """Rows of the response's tokens: token t is predicted at position prompt_length - 1 + t (docs/method.md 2)."""
    if prompt_length < 1 or response_length < 1:
        checks.fail(
            "response_rows",
            "prompt_length, response_length",
            "at least one token each",
            (prompt_length, response_length),
            "Count padding in: both are lengths of the padded tensors.",
        )
    return slice(prompt_length - 1, prompt_length - 1 + response_length)


def record_frame_mass(
    model: nn.Module,
    frame_ids: FrameIds | Tensor,
    *,
    rows: slice | Tensor,
    layers: int | Sequence[int] = 3,
    reduction: str = "mean",
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

    Returns:
        The recorder; ``recorder.mass`` is (B, R, F) fp32, the mean over query heads and tapped layers, detached, of the
        last forward (each forward starts anew; a recomputation under gradient checkpointing changes nothing).
        A row that sees no key, and a frame without keys, have exactly 0. Attention dropout is left out of account.
        The recorder can be entered again, and within other recorders of the same model.

    Raises:
        ValueError: here, for arguments that do not fit the model; in the forward, for keys that do not fit
            ``frame_ids``, a mask that is no interval per row (bidirectional blocks, biases), soft caps and sinks.
        RuntimeError: at ``.mass``, before a forward has passed the tapped layers.

    Compiled models can be recorded as well; the tapped layers break the graph.
    """
    return FrameMassRecorder(model, frame_ids, rows, layers, reduction)


class FrameMassRecorder:
    """See ``record_frame_mass``."""

    def __init__(
        self,
        model: nn.Module,
        frame_ids: FrameIds | Tensor,
        rows: slice | Tensor,
        layers: int | Sequence[int],
        reduction: str,
    ) -> None:
        if reduction not in ("mean", "sum"):
            checks.fail(OP, "reduction", '"mean" or "sum"', repr(reduction), "Pass one of these.")
        self._frame_ids, self._num_frames = _check_frame_ids(frame_ids)
        self._rows = _check_rows(rows, *self._frame_ids.shape)
        self._decoder, self._layers = attention_layers(model, layers)
        self._reduction = reduction
        self._hooks: list[Any] = []
        self._depth = 0  # how often the context is open
        self._in_forward = False
        self._total: Tensor | None = None  # (B, R, F): sum over the layers recorded so far; fp64 in fp64 models
        self._recorded: list[int] = []  # their numbers, once for each pass (some models run a layer several times)
        # Layers share their mask tensor, and its intervals are found once a forward: (mask, window, result)
        self._visibility: tuple[Any, Any, Visibility] | None = None
        self._packed: tuple[GroupLayout, list[RowsOfGroup]] | None = None  # rows of each group, found once a forward

    @property
    def layers(self) -> list[int]:
        """Numbers of the tapped layers, ascending."""
        return sorted(self._layers)

    @property
    def mass(self) -> Tensor:
        """(B, R, F) fp32 mass of the last forward, mean over heads and tapped layers; detached."""
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
        self._depth, self._in_forward, self._visibility, self._packed = 0, False, None, None
        for module in self._layers.values():
            untap_module(module, self)
        while self._hooks:
            self._hooks.pop().remove()

    def _reset(self) -> None:
        self._total, self._recorded, self._visibility, self._packed = None, [], None, None

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
        self._in_forward, self._visibility = False, None

    def record(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        mask: Any,
        implementation: str | None,
        is_causal: bool,
        options: dict[str, Any],
        lse: Tensor | None,
    ) -> None:
        """Adds the mass of one tapped layer; query (B, Hq, L, d) and key (B, Hkv, S, d) as its attention got them.

        lse: (B, Hq, L) over all keys that the rows see, where the attention returned it.
        """
        if not self._in_forward:
            return
        for name in UNSUPPORTED:
            if options.get(name) is not None:
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
        if first_row and int(self._rows.min()) < first_row:
            checks.fail(
                OP,
                "rows",
                f"positions {first_row} to {length - 1}, which this forward computes",
                int(self._rows.min()),
                "Positions before these are in the KV cache; record the forward that computed them.",
            )
        if self._total is None:
            dtype = torch.promote_types(query.dtype, torch.float32)
            self._total = torch.zeros(batch, self._rows.shape[1], self._num_frames, dtype=dtype, device=query.device)
        query, key, scale = query.detach(), key.detach().to(query.dtype), options.get("scaling")
        if options.get("group_layout") is not None:
            self._record_groups(layer, query, key, lse, options["group_layout"], scale)
            return
        visibility = self._visible(query, key, mask, implementation, is_causal, options)
        rows = self._rows - first_row
        self._add(
            layer,
            None,
            query=_select(query, rows),
            key=key,
            frame_ids=self._frame_ids,
            lse=None if lse is None else _select(lse[..., None], rows)[..., 0],
            first_key=visibility.first_key,
            last_key=visibility.last_key,
            prefix_keys=visibility.prefix_keys,
            scale=scale,
        )
        self._recorded.append(layer)

    def _add(self, layer: int, place: Tensor | None, **operands: Any) -> None:
        """Add the mass of one layer to the total: of the rows at ``place``, or of all where that is None."""
        assert self._total is not None
        settings = operands | {"num_frames": self._num_frames, "reduction": self._reduction}
        if place is None:
            frame_mass(**settings, out=self._total)
        else:
            self._total[:, place] += frame_mass(**settings)

    def _record_groups(
        self, layer: int, query: Tensor, key: Tensor, lse: Tensor | None, layout: GroupLayout, scale: float | None
    ) -> None:
        """Of a packed row: each group's rows on the frames of its own prompt."""
        if lse is None:
            remedy = 'Use attn_implementation "appo" for the text layers.'
            checks.fail(OP, "model", "attention that returns the lse of a packed row", f"none in layer {layer}", remedy)
        if self._packed is None or self._packed[0] is not layout:
            self._packed = layout, rows_by_group(self._rows, self._frame_ids, layout)
        for group in self._packed[1]:
            self._add(
                layer,
                group.place,
                query=query[:, :, group.rows],
                key=key[:, :, group.prompt],
                frame_ids=self._frame_ids[:, group.prompt],
                lse=lse[:, :, group.rows],
                last_key=group.last_key,
                scale=scale,
            )
        self._recorded.append(layer)

    def _move_to(self, device: torch.device) -> None:
        """Layers of one model may lie on several devices; the recorder follows them."""
        if self._rows.device != device:
            self._rows, self._frame_ids = self._rows.to(device), self._frame_ids.to(device)
        if self._total is not None and self._total.device != device:
            self._total, self._visibility, self._packed = self._total.to(device), None, None

    def _visible(
        self,
        query: Tensor,
        key: Tensor,
        mask: Any,
        implementation: str | None,
        is_causal: bool,
        options: dict[str, Any],
    ) -> Visibility:
        window = options.get("sliding_window")
        if self._visibility is None or self._visibility[0] is not mask or self._visibility[1] != window:
            found = visible_keys(
                self._rows,
                mask,
                num_queries=query.shape[2],
                num_keys=key.shape[2],
                implementation=implementation,
                is_causal=is_causal,
                options=options,
            )
            self._visibility = (mask, window, found)
        return self._visibility[2]


def _select(query: Tensor, rows: Tensor) -> Tensor:
    """(B, Hq, L, d) and (B, R) -> (B, Hq, R, d)."""
    batch = torch.arange(len(rows), device=rows.device)[:, None]
    return query.transpose(1, 2)[batch, rows].transpose(1, 2)


def _check_frame_ids(frame_ids: FrameIds | Tensor) -> tuple[Tensor, int]:
    """(B, S) int32 and the largest number of frames."""
    if isinstance(frame_ids, FrameIds):
        ids, num_frames = frame_ids.ids, int(frame_ids.num_frames.max())
    else:
        ids, num_frames = frame_ids, -1
    checks.rank(OP, "frame_ids", ids, 2, "(B, S)")
    checks.dtype(OP, "frame_ids", ids, checks.INTS)
    if not ids.numel():
        checks.fail(
            OP, "frame_ids", "at least one token", f"shape {tuple(ids.shape)}", "Pass a batch that is not empty."
        )
    most = int(ids.max()) + 1
    if num_frames >= 0 and most > num_frames:
        checks.fail(
            OP, "frame_ids", f"ids below num_frames = {num_frames}", most - 1, "Pass what frame_ids() returned."
        )
    return checks.narrowed(ids), max(most, num_frames)


def _check_rows(rows: slice | Tensor, batch: int, length: int) -> Tensor:
    """(B, R) int64 positions within the sequences."""
    if isinstance(rows, slice):
        for bound in (rows.start, rows.stop):
            if bound is not None and not -length <= bound <= length:
                checks.fail(
                    OP, "rows", f"a slice within the {length} tokens of `frame_ids`", rows, "Slices are not clipped."
                )
        positions = torch.arange(length)[rows].expand(batch, -1)
    else:
        checks.rank(OP, "rows", rows, 2, "(B, R)")
        checks.dtype(OP, "rows", rows, checks.INTS)
        checks.shape(OP, "rows", rows, (batch, rows.shape[1]), "(B, R)", "Pass one row of positions per sequence.")
        positions = rows.long()
    if not positions.numel():
        checks.fail(OP, "rows", "at least one position", rows, "Use response_rows(prompt_length, response_length).")
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= length:
        checks.fail(
            OP,
            "rows",
            f"positions 0 to {length - 1} (the tokens of `frame_ids`)",
            f"{low} to {high}",
            "Use response_rows(prompt_length, response_length), with padding counted.",
        )
    return positions
