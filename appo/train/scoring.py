"""Results of the policy's forwards over sampled responses: log-probabilities, entropy, frame mass, token weights."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from appo.config import APPOConfig
from appo.method.token_filters import off_policy_sequences, top_entropy_tokens
from appo.train.groups import Group, Part, ResponseBatch, known, stack_tokens, token_weights_of
from appo.train.policy import Policy
from appo.train.rules import WeighTokens
from appo_kernels import group_divergence, token_logprobs


@torch.no_grad()
def score_parts(
    parts: Sequence[Part], batch: ResponseBatch, policy: nn.Module, unwrapped: Policy, config: APPOConfig
) -> None:
    """Fill in log-probabilities and entropy, and what the method asks for: frame mass, and what weighing needs.

    batch: the parts side by side. policy: ``unwrapped`` inside what synchronises or shards it, as it is called.
    """
    sequences = unwrapped.sequences(batch)
    recorder: Any = None
    recorded = config.records_mass and batch.prompts.num_frames > 0
    if recorded and sequences.rows.numel():  # responses that are all empty have no row to record
        recorder = unwrapped.recorder(sequences, config)

    # A function that the policy calls, because its head's weight may be in shards, and is whole inside a forward only.
    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        return hidden, _token_values(batch, hidden, weight, bias, unwrapped.logit_arguments(config))

    with recorder or nullcontext():
        hidden, (logprobs, entropy, lse) = policy(batch, head, sequences)
    mass = None
    if recorder is not None:
        mass = sequences.per_response(recorder.mass).cpu()
    elif recorded:
        mass = torch.zeros(*batch.mask.shape, batch.prompts.num_frames)
    for part, *found in zip(parts, *map(batch.split, (logprobs, entropy, lse, hidden)), strict=True):
        group = part.group
        group.old_logprobs = _filled(group.old_logprobs, part, found[0].cpu())
        group.entropy = _filled(group.entropy, part, found[1].cpu())
        if config.weighs(group.prompt.num_frames):
            group.lse = _filled(group.lse, part, found[2])
            group.hidden = _filled(group.hidden, part, found[3])
    if mass is not None:
        for part, of_part in zip(parts, batch.split(mass), strict=True):
            group, frames = part.group, part.group.prompt.num_frames
            if frames > 0:
                group.mass, group.mass_reduction = (
                    _filled(group.mass, part, of_part[..., :frames]),
                    config.mass_reduction,
                )


def _filled(total: Tensor | None, part: Part, values: Tensor) -> Tensor:
    """``total`` (G, N, ...), or zeros, with the values (responses, <= N or more, ...) of a part in their places."""
    group, longest = part.group, part.group.mask.shape[1]
    if total is None or part.responses[0] == 0:
        total = values.new_zeros(len(group.mask), longest, *values.shape[2:])
    own = values[:, :longest]
    total[list(part.responses), : own.shape[1]] = own
    return total


@torch.no_grad()
def score_reference(
    parts: Sequence[Part],
    batch: ResponseBatch,
    reference: Callable[[], AbstractContextManager[Any]],
    config: APPOConfig,
) -> None:
    """Fill in log-probabilities under the reference policy, for the KL term (beta > 0)."""
    with reference() as policy:
        logprobs = response_logprobs(batch, policy, policy, config)
    for part, rows in zip(parts, batch.split(logprobs), strict=True):
        part.group.ref_logprobs = _filled(part.group.ref_logprobs, part, rows)


@torch.no_grad()
def response_logprobs(batch: ResponseBatch, policy: nn.Module, unwrapped: Policy, config: APPOConfig) -> Tensor:
    """Log-probabilities (B, N) fp32 of the responses, on the CPU, in a forward of their own; 0 at padding.

    batch: of `batch_parts`, or one whose ``prompts.inputs`` were changed. policy: as for `score_parts`.
    """

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _token_values(batch, hidden, weight, bias, unwrapped.logit_arguments(config))[0]

    logprobs: Tensor = policy(batch, head)
    return logprobs.cpu()


def keep(name: str, parts: Sequence[Part], batch: ResponseBatch, values: Tensor) -> None:
    """Put ``values`` (B, N, ...) of the responses of ``batch`` into ``group.more[name]`` of each of the parts."""
    for part, rows in zip(parts, batch.split(values), strict=True):
        part.group.more[name] = _filled(part.group.more.get(name), part, rows)


@torch.no_grad()
def weigh_groups(groups: Sequence[Group], policy: Policy, weigh_tokens: WeighTokens, config: APPOConfig) -> None:
    """Fill in the token weights of scored groups that have frames, and drop what only weighing needs."""

    def weigh_all() -> None:
        for group in groups:
            chosen = group.target_frames is not None or (config.method != "appo" and group.tokens > 0)
            if group.hidden is not None and chosen:
                weight, bias = policy.output_head(group.hidden.dtype)
                group.weights = weigh_tokens(group, divergence_of(group, weight, bias), config).cpu()
            group.hidden = group.lse = None

    def divergence_of(group: Group, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        hidden, lse = group.hidden, group.lse
        assert hidden is not None and lse is not None
        settings = {"kind": config.divergence, "bias": bias} | policy.logit_arguments(config)
        return lambda slots: group_divergence(hidden, weight, lse, slots.to(hidden.device), **settings).cpu()

    policy.run(weigh_all)  # a forward, like that of the head above


@torch.no_grad()
def filter_tokens(groups: Sequence[Group], config: APPOConfig) -> None:
    """Multiply token weights of 0 and 1 in: the most uncertain tokens of the batch, of all processes, which call alike;
    and responses that the model has moved away from since they were sampled."""
    scored = [group for group in groups if group.scored]
    if config.entropy_share < 1:
        entropy = stack_tokens([known(group.entropy) for group in scored], 0.0) if scored else torch.zeros(1, 1)
        mask = stack_tokens([group.mask for group in scored], False) if scored else torch.zeros(1, 1, dtype=torch.bool)
        kept = top_entropy_tokens(entropy, mask, share=config.entropy_share)
        for group, rows in zip(scored, kept.split([len(g.mask) for g in scored]) if scored else (), strict=True):
            group.weights = token_weights_of(group) * rows[:, : group.mask.shape[1]]
    if config.off_policy_threshold is not None:
        for group in scored:
            kept = off_policy_sequences(
                known(group.old_logprobs), group.rollout_logprobs, known(group.advantages), group.mask,
                threshold=config.off_policy_threshold,
            )  # fmt: skip
            group.weights = token_weights_of(group) * kept


def _token_values(
    batch: ResponseBatch, hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: dict[str, Any]
) -> list[Tensor]:
    """Log-probability, entropy and log-sum-exp of every response token, each (B, N) fp32; 0 at padding."""
    targets = batch.completion_ids[batch.mask]
    values = token_logprobs(hidden[batch.mask], weight, targets, bias=bias, **logits)
    return [torch.zeros(batch.mask.shape, device=x.device).masked_scatter(batch.mask, x) for x in values]
