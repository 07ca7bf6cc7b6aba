"""The policy gradient of one group of responses under many ways of weighting its tokens, as count sketches."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from appo.credit.sketch import CountSketch
from appo.train.groups import Group, batch_parts, known, whole_groups
from appo.train.trainer import Trainer
from appo_kernels import token_logprobs


def trained_parameters(trainer: Trainer) -> list[Tensor]:
    """The parameters that a run would train, in a fixed order."""
    return [parameter for parameter in trainer.unwrapped.parameters() if parameter.requires_grad]


def group_gradients(
    trainer: Trainer, group: Group, weights: Mapping[str, Tensor], sketch: CountSketch
) -> dict[str, Tensor]:
    """name: sketch (size,) of the gradient of (1/G) sum of W A log p over the tokens of a group with advantages.

    That is the ascent direction of every clipped surrogate at ratio 1, as in the first update on fresh rollouts, summed
    over tokens ("dapo" aggregation up to a factor). One forward, and a backward for each entry of ``weights`` (G, N)
    that is not equal to an earlier one.
    """
    device = trainer.accelerator.device
    batch = batch_parts(whole_groups([group]), trainer.pad_id, device)
    targets = batch.completion_ids[batch.mask]
    logits = trainer.unwrapped.logit_arguments(trainer.config)

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return token_logprobs(hidden[batch.mask], weight, targets, bias=bias, **logits).logprobs

    with trainer.autocast():
        logprobs = trainer.policy(batch, head)
    parameters = trained_parameters(trainer)
    found: dict[str, Tensor] = {}
    factor = known(group.advantages)[:, None] / len(group.mask)
    last = list(weights)[-1]
    first = _first_equals(weights, group.mask)
    for name, weight in weights.items():
        if first[name] != name:
            found[name] = found[first[name]]
            continue
        each = (weight * factor)[group.mask].to(device)
        if not each.any():
            found[name] = torch.zeros(sketch.size)
            continue
        gradients = torch.autograd.grad(
            (each * logprobs).sum(), parameters, retain_graph=name != last, allow_unused=True
        )
        found[name] = sketch(gradients).cpu()
    return found


def _first_equals(weights: Mapping[str, Tensor], mask: Tensor) -> dict[str, str]:
    """For each name, the first whose weights are the same at all tokens: W = 1 for a rule that finds no frame."""
    found: dict[str, str] = {}
    for name, weight in weights.items():
        same = (other for other in dict.fromkeys(found.values()) if torch.equal(weights[other][mask], weight[mask]))
        found[name] = next(same, name)
    return found


class HitCounts(NamedTuple):
    """The part of a weighting's bonus that is on evidence tokens, of a group or of several.

    The bonus of a token is its weight above the least of its group. evidence_bonus: of evidence tokens; bonus: of all.
    above_mean: evidence tokens that weigh more than their response's mean; evidence: all of them.
    """

    evidence_bonus: float
    bonus: float
    above_mean: float
    evidence: float


def hit_counts(weights: Tensor, mask: Tensor, evidence: Tensor) -> HitCounts:
    """Of a group's weights, mask and evidence tokens, (G, N) each."""
    bonus = (weights - weights[mask].min()).masked_fill(~mask, 0)
    mean = (weights * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    # More by rounding is not more.
    above = evidence & (weights > mean + 1e-4 * mean.abs())
    return HitCounts(float(bonus[evidence].sum()), float(bonus.sum()), float(above.sum()), float(evidence.sum()))


def evidence_aucs(weights: Tensor, mask: Tensor, evidence: Tensor) -> list[float]:
    """The ROC AUC of the weights for evidence tokens, in each response with such and others; ties count half."""
    found = []
    for row, valid, labels in zip(weights, mask, evidence, strict=True):
        right, wrong = row[valid & labels], row[valid & ~labels]
        if len(right) and len(wrong):
            difference = right[:, None] - wrong[None]
            found.append(float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean()))
    return found
