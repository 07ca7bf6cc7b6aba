"""The layout of a packed row: groups one after another, each its prompt and then its responses."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from appo_kernels import checks


class Group(NamedTuple):
    """The places of one group in the row; ``responses`` are those that have tokens, one after another."""

    prompt: slice
    responses: tuple[slice, ...]

    @property
    def answers(self) -> slice:
        """The places of all responses together; empty when no response has a token."""
        return slice(self.prompt.stop, self.responses[-1].stop if self.responses else self.prompt.stop)

    @property
    def whole(self) -> slice:
        return slice(self.prompt.start, self.answers.stop)


class GroupLayout:
    """The lengths of prompts and responses that stand in one row without padding: prompt, response 1 .. G, next group.

    A prompt token sees its prompt up to itself, a response token its whole prompt and its own response up to itself;
    groups do not see each other.

    Args:
        prompt_lengths: (groups,) tokens of each prompt, at least 1.
        response_lengths: (groups, G) tokens of each response; 0: an empty one. Groups may have different G.

    Both are host integers: sequences of int, or tensors on the CPU. ``lengths`` holds them as one (groups, 1 + G) int64
    tensor on the CPU, where 0 stands for an empty or missing response. A tensor, so that a compiled model is compiled
    once for all layouts of one size; on the CPU, so that reading it waits for no device.

    Raises ValueError for a length that is no integer or too small, and for different numbers of groups.
    """

    def __init__(self, prompt_lengths: Sequence[int] | Tensor, response_lengths: Sequence[Sequence[int]] | Tensor):
        prompts = _integers("prompt_lengths", prompt_lengths, 1)
        rows: list[Any] = list(response_lengths)
        responses = [_integers("response_lengths", row, 0) for row in rows]
        if not prompts:
            checks.fail(OP, "prompt_lengths", "at least one prompt", "none", "Leave an empty batch out.")
        if len(prompts) != len(responses):
            checks.fail(
                OP, "response_lengths", f"one row for each of the {len(prompts)} prompts", f"{len(responses)} rows",
                "Pass the responses of each prompt as a row of their own, an empty one where there are none.",
            )  # fmt: skip
        size = max(map(len, responses))
        table = [[prompt, *row, *[0] * (size - len(row))] for prompt, row in zip(prompts, responses, strict=True)]
        self.lengths = torch.tensor(table, dtype=torch.int64)

    @classmethod
    def of_lengths(cls, lengths: Tensor) -> "GroupLayout":
        """From a table as ``lengths`` is, which is not checked again."""
        layout = cls.__new__(cls)
        layout.lengths = lengths
        return layout

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def pairs(self) -> int:
        """Query-key pairs that attention computes: P (P + 1) / 2 + P sum(N_i) + sum(N_i (N_i + 1) / 2), over groups."""
        prompt, responses = self.lengths[:, 0], self.lengths[:, 1:]
        own = (responses * (responses + 1) // 2).sum(1)
        return int((prompt * (prompt + 1) // 2 + prompt * responses.sum(1) + own).sum())

    @property
    def groups(self) -> list[Group]:
        found, start = [], 0
        for prompt, *responses in self.lengths.tolist():
            ends = [start + prompt]
            for length in responses:
                ends.append(ends[-1] + length)
            pieces = (slice(a, b) for a, b in itertools.pairwise(ends) if b > a)
            found.append(Group(slice(start, start + prompt), tuple(pieces)))
            start = ends[-1]
        return found

    def __repr__(self) -> str:
        return f"GroupLayout({self.lengths[:, 0].tolist()}, {self.lengths[:, 1:].tolist()})"


OP = "GroupLayout"


def _integers(name: str, lengths: Any, least: int) -> list[int]:
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu" or lengths.dim() != 1 or lengths.dtype not in checks.INTS:
            got = f"{tuple(lengths.shape)} {lengths.dtype} on {lengths.device}"
            checks.fail(OP, name, "host integers", got, "Pass lists of int, or integer tensors on the CPU.")
        lengths = lengths.tolist()
    found = list(lengths)
    for length in found:
        if isinstance(length, bool) or not hasattr(length, "__index__") or length.__index__() < least:
            remedy = "A prompt has a token at least; an empty response has length 0."
            checks.fail(OP, name, f"integers of at least {least}", repr(length), remedy)
    return [length.__index__() for length in found]


class Bounds(NamedTuple):
    """The visibility of one group's rows among its own keys, by the rule of frame_attention; (1, R) int32 each."""

    first_key: Tensor
    last_key: Tensor
    prefix_keys: Tensor


def bounds(group: Group, device: torch.device) -> Bounds:
    """A response's rows see the prompt as a prefix and their own response as an interval."""
    return _bounds(group.prompt.stop - group.prompt.start, tuple(r.stop - r.start for r in group.responses), device)


@functools.lru_cache(maxsize=32)  # the layers of a forward ask for the same ones
def _bounds(prompt: int, responses: tuple[int, ...], device: torch.device) -> Bounds:
    lengths = torch.tensor([prompt, *responses])
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    place = torch.arange(len(starts))
    prefix = torch.where(place < prompt, 0, prompt)
    return Bounds(*(t.int()[None].to(device, non_blocking=True) for t in (starts, place, prefix)))
