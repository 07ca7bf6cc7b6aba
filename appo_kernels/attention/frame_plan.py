"""FramePlan: frames and visibility once per forward, for all layers, heads, forwards and backwards.

What attention over frames works out from frame ids and visibility alone (checks of values, keys sorted by frame, tiles,
block masks) is kept with a plan's frame ids: a tensor of the plan's own, by whose identity `kept` finds it again inside
the custom operators, which take tensors only. Where the identity is lost it is worked out anew, with the same result.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from appo_kernels import checks
from appo_kernels.attention.group_layout import GroupLayout, bounds

T = TypeVar("T")
OP = "FramePlan"
_KEPT: Any = WeakTensorKeyDictionary()  # frame ids of a plan -> what was worked out for them


def kept(frame_ids: Tensor, name: Hashable, make: Callable[[], T]) -> T:
    """``make()``, or what it returned before for the plan of these ``frame_ids``; without a plan nothing is kept, nor
    outside of the custom operators while a graph is traced."""
    results = None if torch.compiler.is_compiling() else _KEPT.get(frame_ids)
    if results is None:
        return make()
    if name not in results:
        results[name] = make()
    return results[name]


def is_kept(frame_ids: Tensor, name: Hashable) -> bool:
    """True where ``kept`` would make nothing."""
    results = None if torch.compiler.is_compiling() else _KEPT.get(frame_ids)
    return results is not None and name in results


class GroupRows(NamedTuple):
    """One group of a packed row, as a problem of its own."""

    rows: Tensor | slice  # which of the rows of the call, (R_g,) int64 where they are not neighbours
    keys: slice  # its tokens among the keys
    plan: "FramePlan"


class FramePlan:
    """Frames of keys and visibility of rows, for ``frame_mass`` and ``frame_attention`` with ``plan=...``.

    Make one with ``build`` or ``of_layout``, once per forward, and hand it to every layer's call instead of frame ids,
    number of frames and bounds. Results are those of these arguments. What is given must not be changed in place.
    """

    def __init__(
        self,
        frame_ids: Tensor,
        num_frames: int,
        bounds: tuple[Tensor | None, Tensor | None, Tensor | None],
        groups: Sequence[GroupRows] = (),
        shape: tuple[int, int] | None = None,
    ) -> None:
        self.frame_ids, self.num_frames, self.bounds = frame_ids, num_frames, bounds
        self.groups = tuple(groups)  # of a packed row; the call is then one for each
        self.rows_and_keys = shape  # of a packed row
        self.order: Tensor | None = None  # (R,) int64: of the call's rows, those of the groups one after another
        _KEPT[frame_ids] = {}

    @classmethod
    def build(
        cls,
        frame_ids: Tensor,
        num_frames: int,
        *,
        first_key: Tensor | None = None,
        last_key: Tensor | None = None,
        prefix_keys: Tensor | None = None,
    ) -> "FramePlan":
        """frame_ids (B, S) int, -1 for none; bounds (B, R) int or None, as of ``frame_mass``."""
        checks.rank(OP, "frame_ids", frame_ids, 2, "(B, S)")
        checks.dtype(OP, "frame_ids", frame_ids, checks.INTS)
        for name, bound in (("first_key", first_key), ("last_key", last_key), ("prefix_keys", prefix_keys)):
            if bound is not None:
                checks.rank(OP, name, bound, 2, "(B, R)")
                checks.dtype(OP, name, bound, checks.INTS)
        found = [None if bound is None else checks.narrowed(bound) for bound in (first_key, last_key, prefix_keys)]
        # Its own tensor: plans of one tensor with other bounds keep apart.
        return cls(checks.narrowed(frame_ids).clone(), num_frames, (found[0], found[1], found[2]))

    @classmethod
    def of_layout(
        cls, frame_ids: Tensor, num_frames: int, layout: GroupLayout, *, rows: Tensor | None = None
    ) -> "FramePlan":
        """Groups in one row: every group on its own frames, numbered from 0 in each, "mean" over its own keys.

        Args:
            frame_ids: (1, T) int, the frame of each token within its group, -1 for none; frames stand in prompts.
            num_frames: F, of the group that has most.
            layout: the lengths of prompts and responses.
            rows: (R,) or (1, R) int, the places of the query rows of the calls; None: all T tokens.

        Raises ValueError for another number of tokens, a place outside the row, and a frame in a response.
        """
        checks.dtype(OP, "frame_ids", frame_ids, checks.INTS)
        remedy = "Pass the frame of every token of the row, -1 for responses and text."
        checks.shape(OP, "frame_ids", frame_ids, (1, layout.tokens), "(1, T)", remedy)
        device = frame_ids.device
        places = (torch.arange(layout.tokens) if rows is None else rows).flatten().long().cpu()
        if places.numel() and (int(places.min()) < 0 or int(places.max()) >= layout.tokens):
            got = f"{int(places.min())} to {int(places.max())}"
            checks.fail(OP, "rows", f"places 0 to {layout.tokens - 1}", got, "Pass places of the packed row.")
        on_host, found, order = frame_ids[0].cpu(), [], []
        for group in layout.groups:
            whole, answers = group.whole, group.answers
            if bool((on_host[answers] >= 0).any()):
                remedy = "Mark the tokens of responses with -1."
                checks.fail(OP, "frame_ids", "frames in prompts only", "a frame in a response", remedy)
            chosen = ((places >= whole.start) & (places < whole.stop)).nonzero().flatten()
            if chosen.numel():
                own = (places[chosen] - whole.start).to(device)
                first, last, prefix = (bound[:, own] for bound in bounds(group, device))
                plan = cls.build(frame_ids[:, whole], num_frames, first_key=first, last_key=last, prefix_keys=prefix)
                start, stop = int(chosen[0]), int(chosen[-1]) + 1
                neighbours = stop - start == len(chosen)
                found.append(GroupRows(slice(start, stop) if neighbours else chosen.to(device), whole, plan))
                order.append(chosen)
        shape = (len(places), layout.tokens)
        made = cls(checks.narrowed(frame_ids).clone(), num_frames, (None, None, None), found, shape)
        ordered = torch.cat(order) if order else places
        if bool((ordered.diff() < 0).any()):
            made.order = ordered.argsort().to(device)
        return made

    def joined(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Results of the groups, which lie along ``dim``, as those of the call's rows."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
        return whole if self.order is None else whole.index_select(dim, self.order)

    def check_call(self, op: str, query: Tensor, key: Tensor) -> None:
        """That a call with groups has their rows and tokens; shapes of the others are checked with their tensors."""
        if self.rows_and_keys is not None:
            got = (query.shape[0], query.shape[2], key.shape[2])
            if got != (1, *self.rows_and_keys):
                remedy = "Pass the query rows that the plan was made for, and the keys of the whole packed row."
                checks.fail(op, "plan", f"(B, R, S) = {(1, *self.rows_and_keys)} as its layout and rows", got, remedy)


Bounds = tuple[Tensor | None, Tensor | None, Tensor | None]


def planned(
    op: str, plan: FramePlan | None, frame_ids: Tensor | None, num_frames: int | None, given: Bounds
) -> tuple[Tensor, int, Bounds]:
    """frame_ids, num_frames and bounds of a call, from its plan or from its arguments."""
    if plan is None:
        if frame_ids is None or num_frames is None:
            name = "frame_ids" if frame_ids is None else "num_frames"
            checks.fail(
                op, name, "a value, or a plan", "None", "Pass frame_ids and num_frames, or plan=FramePlan.build(...)."
            )
        return frame_ids, num_frames, given
    if not isinstance(plan, FramePlan):
        checks.fail(op, "plan", "a FramePlan", type(plan).__name__, "Make one with FramePlan.build(...).")
    names = ("frame_ids", "num_frames", "first_key", "last_key", "prefix_keys")
    twice = [name for name, value in zip(names, (frame_ids, num_frames, *given), strict=True) if value is not None]
    if twice:
        checks.fail(op, "plan", "no other frames or bounds beside it", ", ".join(twice), "The plan was made of them.")
    return plan.frame_ids, plan.num_frames, plan.bounds
