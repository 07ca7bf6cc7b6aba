"""The prompts of a step: the next records, without those that cannot be read."""

import logging
from typing import Any

from appo.config import APPOConfig
from appo.data.prompts import Prompt, PromptBuilder
from appo.data.records import DataError
from appo.data.sampler import RecordSampler
from appo.rollout.engine import seed_of

logger = logging.getLogger("appo")


def draw_prompts(
    sampler: RecordSampler, build_prompt: PromptBuilder, count: int, config: APPOConfig, broken: list[dict[str, Any]]
) -> tuple[list[Prompt], list[int]]:
    """``count`` prompts and the seed of each.

    The seed depends on the place in the order of records, not on processes, steps or resumption. A record that cannot
    be read is skipped when ``on_broken`` says so, and entered into ``broken``. Raises DataError for it otherwise, and
    when as many are broken as there are.
    """
    build_prompt.prefetch(record for _, record in sampler.peek(count))
    prompts: list[Prompt] = []
    seeds: list[int] = []
    while len(prompts) < count:
        ((position, record),) = sampler.take(1)
        try:
            prompts.append(build_prompt(record))
            seeds.append(seed_of(config.seed, position))
        except DataError as error:
            if config.on_broken == "stop":
                raise
            logger.warning("skipped: %s", error)
            broken.append({"id": record.id, "place": record.place, "error": str(error)})
            if len(broken) >= len(sampler.records):
                raise DataError(f"none of {len(broken)} records can be read; the last: {error}") from error
    return prompts, seeds
