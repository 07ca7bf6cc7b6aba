"""Data of a training step: groups of responses, and batches of groups padded for the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from appo.data.prompt_batch import PromptBatch, collate
from appo.data.prompts import Prompt
from appo.rollout.engine import Completion

T = TypeVar("T")


@dataclass
class Group:
    """The G responses sampled for one prompt, N tokens each (padded on the right), and all that is known about them.

    Everything is on the CPU but what scoring leaves for weighing (``hidden``, ``lse``).
    """

    prompt: Prompt
    completion_ids: Tensor  # (G, N) int64
    mask: Tensor  # (G, N) bool: the response's tokens, its end token included
    rollout_logprobs: Tensor  # (G, N) fp32, as the engine that sampled them saw them
    finished: Tensor  # (G,) bool: False for a response that was cut off at the length limit
    texts: list[str]
    rewards: Tensor  # (G,) fp32, the weighted sum
    accuracy: Tensor  # (G,) fp32, what divides S1 from S2
    rewards_by_name: dict[str, Tensor]  # (G,) each; NaN where a reward does not apply
    unreadable: dict[str, Tensor] = field(default_factory=dict)  # (G,) bool each: no answer was found to compare
    place: int = 0  # in the step, among those of all processes

    weight_version: int = 0  # of the weights that sampled: the step that made them

    # Filled in by scoring, which leaves out groups that cannot move the model.
    old_logprobs: Tensor | None = None  # (G, N) fp32
    ref_logprobs: Tensor | None = None  # (G, N) fp32, with beta > 0
    entropy: Tensor | None = None  # (G, N) fp32
    mass: Tensor | None = None  # (G, N, F) fp32; None without frames, or where nothing is recorded
    mass_reduction: str = "mean"
    hidden: Tensor | None = None  # (G, N, D) of the rows that predict each token; dropped once tokens are weighed
    lse: Tensor | None = None  # (G, N) fp32, of the logits at the sampling temperature; dropped with them

    more: dict[str, Tensor] = field(default_factory=dict)  # (G, N, ...) each: what a method of one's own has scored

    target_frames: Tensor | None = None  # (K,) int64: psi'
    weights: Tensor | None = None  # (G, N) fp32: W of docs/method.md section 5; None: all ones
    advantages: Tensor | None = None  # (G,) fp32, or (G, N) of a method that has one for each token

    @property
    def informative(self) -> bool:
        """Whether the rewards differ, so that some advantage is not zero."""
        return bool(self.rewards.max() > self.rewards.min())

    @property
    def scored(self) -> bool:
        return self.old_logprobs is not None

    def drop_score_unless_finite(self) -> bool:
        """Whether what scoring filled in is finite at every token; all of it is taken back where it is not."""
        values = [self.old_logprobs, self.entropy, self.ref_logprobs, self.mass]
        finite = all(bool(value[self.mask].isfinite().all()) for value in values if value is not None)
        if not finite:
            self.old_logprobs = self.entropy = self.ref_logprobs = self.mass = self.hidden = self.lse = None
        return finite

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())


def known(value: T | None) -> T:
    """``value``, which an earlier part of the step has filled in."""
    assert value is not None, "this part of a step needs what an earlier one fills in"
    return value


def pad_completions(completions: Sequence[Completion], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """The responses of a group side by side: ids (G, N) int64, mask (G, N) bool and log-probabilities (G, N) fp32."""
    ids = pad_sequence([c.ids for c in completions], batch_first=True, padding_value=pad_id)
    logprobs = pad_sequence([c.logprobs for c in completions], batch_first=True)
    lengths = torch.tensor([len(c.ids) for c in completions])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None], logprobs


class Part(NamedTuple):
    """A group's prompt with some of its responses: what of it one forward computes."""

    group: Group
    responses: tuple[int, ...]  # which of the G, ascending

    @property
    def last(self) -> bool:
        """Whether the group is complete with it, where parts come in order."""
        return self.responses[-1] == len(self.group.mask) - 1

    def take(self, values: Tensor) -> Tensor:
        """(G, ...) -> (its responses, ...)."""
        return values[list(self.responses)]


@dataclass
class ResponseBatch:
    """Parts of groups: B responses of up to N tokens, those of one prompt behind one another."""

    prompts: PromptBatch  # one entry per part
    prompt_lengths: list[int]
    lengths: list[list[int]]  # of each part, the tokens of its responses
    completion_ids: Tensor  # (B, N) int64, padded on the right
    mask: Tensor  # (B, N) bool

    @property
    def sizes(self) -> list[int]:
        """Responses of each part."""
        return [len(lengths) for lengths in self.lengths]

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """(B, ...) as (responses, ...) of each part."""
        return values.split(self.sizes)


def batch_parts(parts: Sequence[Part], pad_id: int, device: torch.device | str) -> ResponseBatch:
    """Pad prompts on the left and responses on the right."""
    masks = [part.take(part.group.mask) for part in parts]
    return ResponseBatch(
        prompts=collate([part.group.prompt for part in parts], pad_id, device),
        prompt_lengths=[len(part.group.prompt) for part in parts],
        lengths=[mask.sum(1).tolist() for mask in masks],
        completion_ids=stack_tokens([part.take(part.group.completion_ids) for part in parts], pad_id).to(device),
        mask=stack_tokens(masks, False).to(device),
    )


def whole_groups(groups: Sequence[Group]) -> list[Part]:
    """Groups with all their responses."""
    return [Part(group, tuple(range(len(group.mask)))) for group in groups]


def stack_tokens(tensors: Sequence[Tensor], padding: float) -> Tensor:
    """(G_i, N_i) tensors as one (sum of G_i, max N_i) tensor."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=padding) for t in tensors])


def loss_factor(batch: ResponseBatch, aggregation: str, tokens: float, responses: float) -> float:
    """Factor of the loss of some responses: with it, the losses of a batch's parts add up to the loss of the batch.

    batch: the part's responses; the whole batch has ``tokens`` and ``responses``.
    """
    count = sum(map(sum, batch.lengths))
    # "dapo" divides by the tokens of the whole batch itself; the others are means over these responses alone.
    return {"dapo": 1.0, "bnpo": count / max(tokens, 1.0)}.get(aggregation, len(batch.mask) / responses)


def loss_operands(
    parts: Sequence[Part], device: torch.device | str, *, rollout_logprobs: bool
) -> dict[str, Tensor | None]:
    """The operands of a surrogate loss per token, (B, N) fp32 each, of parts of groups; ``advantages`` are (B,) where
    they are a response's.

    rollout_logprobs: whether the loss corrects for the engine that sampled.
    """

    def stack(values: Sequence[Tensor]) -> Tensor:
        return stack_tokens([part.take(value) for part, value in zip(parts, values, strict=True)], 0.0).to(device)

    groups = [part.group for part in parts]
    advantages = [known(group.advantages) for group in groups]
    if any(values.dim() == 2 for values in advantages):
        shapes = [group.mask.shape for group in groups]
        of_all = stack([v if v.dim() == 2 else v[:, None].expand(s) for v, s in zip(advantages, shapes, strict=True)])
    else:
        of_all = torch.cat([part.take(values) for part, values in zip(parts, advantages, strict=True)]).to(device)
    references = [group.ref_logprobs for group in groups if group.ref_logprobs is not None]
    return {
        "old_logprobs": stack([known(group.old_logprobs) for group in groups]),
        "advantages": of_all,
        "token_weights": stack([token_weights_of(group) for group in groups]),
        "ref_logprobs": stack(references) if references else None,
        "rollout_logprobs": stack([group.rollout_logprobs for group in groups]) if rollout_logprobs else None,
    }


def token_weights_of(group: Group) -> Tensor:
    """W (G, N) fp32: all ones where nothing was weighed."""
    return torch.ones_like(group.rollout_logprobs) if group.weights is None else group.weights
