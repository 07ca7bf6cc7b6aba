"""Settings with which a plan fits: `appo plan --fit`."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from appo.planning.plan import Plan
from appo.planning.workload import NAMES, spelled

Change = dict[str, Any]  # field of a Workload -> value


def fit(plan: Plan, memory: float) -> Plan | None:
    """The plan that fits in ``memory`` bytes a GPU, with the fewest of the cheapest changes; None if none does.

    Cheapest first: a group behind one prompt, one group at a time, the activations of every fourth layer once more in
    the backward, of every second, of all, their inputs in the host's memory, shards, fewer tokens sampled at a time,
    one response at a time (none of which changes what is learned). Then another engine that samples, where the model
    is in shards, or these in the host's memory; LoRA; up to 64 times the GPUs.
    """
    gpus = plan.work.gpus
    for factor in (1, 2, 4, 8, 16, 32, 64):
        prompts = -(-plan.work.prompts // (gpus * factor)) * gpus * factor
        more = {"gpus": gpus * factor, "prompts": prompts} if factor > 1 else {}
        for way in _ways(plan, many=gpus * factor > 1):
            if _changed(plan, [*way, more]).peak() <= memory:
                return _changed(plan, [*_needed(plan, way, more, memory), more])
    return None


def options(before: Plan, after: Plan, *, settings: bool = False) -> list[str]:
    """The changes that make one plan of another: options of the command, or settings of a run."""
    changed = (field for field in NAMES if getattr(before.work, field) != getattr(after.work, field))
    return [spelled(field, getattr(after.work, field), settings=settings) for field in changed]


def _ways(plan: Plan, *, many: bool) -> Iterator[list[Change]]:
    """Changes to try together, cheapest first. many: on several GPUs."""
    work = plan.work
    largest = work.checkpoint_every if work.checkpointing else plan.model.layers
    changes: list[Change] = [
        {"share_prompt": True},
        {"micro_groups": 1},
        *({"checkpointing": True, "checkpoint_every": every} for every in (4, 2, 1) if every <= largest),
        {"checkpointing": True, "checkpoint_offload": True},
        *([{"shard_group": 0}] if many and work.shard_group == 1 else []),
        {"rollout_tokens": min(32_768, work.rollout_tokens)},
        {"micro_tokens": plan.least_tokens},
    ]
    yield from ([*itertools.islice(changes, count)] for count in range(len(changes) + 1))
    apart, offload = {"own_rollout": False}, {"offload": True}
    if many:
        yield [*changes, apart]
    yield [*changes, offload]
    yield [*changes, {"lora_rank": work.lora_rank or 64}]


def _needed(plan: Plan, way: list[Change], more: Change, memory: float) -> list[Change]:
    """``way`` without the changes that it fits without, the dearest left out first."""
    for change in reversed(way[:-1]):
        fewer = [other for other in way if other is not change]
        if _changed(plan, [*fewer, more]).peak() <= memory:
            way = fewer
    return way


def _changed(plan: Plan, way: list[Change]) -> Plan:
    new = {field: value for change in way for field, value in change.items()}
    return replace(plan, work=replace(plan.work, **new))
