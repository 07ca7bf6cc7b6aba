"""`appo parity`: the same clips through a rollout engine and the trainer, and where the two part."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from appo.data.prompts import Prompt
from appo.data.records import Record
from appo.models.loaded import prompt_positions
from appo.rollout.vllm_requests import EngineError
from appo.train.engine_difference import compare, first_difference
from appo.train.groups import whole_groups
from appo.train.trainer import Trainer


@dataclass(frozen=True)
class Parity:
    """One record through both. Differences are of log-probabilities, trainer less engine."""

    record: Record
    tokens: int  # of the prompt, as the trainer reads it
    vision_tokens: int
    grids: list[list[int]]  # (t, h, w) of each video and image
    times: list[tuple[float, float]]  # seconds of each frame
    position: int  # of the first response token, in the trainer
    same_prompt: bool
    problem: str  # where the prompts part; empty if they do not
    numbers: dict[str, float]
    place: tuple[int, int] | None  # (response, token) of the first noticeable difference

    @property
    def equal(self) -> bool:
        return self.same_prompt and self.place is None


def examine_parity(trainer: Trainer, records: Sequence[Record]) -> list[Parity]:
    """Sample a group for each record with the trainer's engine and score it with its model."""
    trainer.policy.eval()
    trainer.sync_engine()
    return [_examine(trainer, trainer.build_prompt(record)) for record in records]


def _examine(trainer: Trainer, prompt: Prompt) -> Parity:
    from appo.data.prompt_batch import collate

    inputs = collate([prompt], trainer.pad_id, trainer.accelerator.device).inputs
    position = int(prompt_positions(trainer.model, inputs)[..., -1].max()) + 1
    grids = [grid for name, rows in prompt.vision.items() if name.endswith("grid_thw") for grid in rows.tolist()]
    pixels = [getattr(trainer.unwrapped.causal.config, name, -1) for name in ("image_token_id", "video_token_id")]
    vision = int(torch.isin(prompt.input_ids, torch.tensor(pixels)).sum())
    problem, numbers, place = "", dict[str, float](), None
    try:
        (group,) = trainer.reward(trainer.sample([prompt], [trainer.config.seed]))
        trainer.score(whole_groups([group]))
        numbers, place = compare(group), first_difference(group)
    except EngineError as error:
        problem = str(error)
    return Parity(
        prompt.record, len(prompt), vision, grids, prompt.frame_times, position, not problem, problem, numbers, place
    )


def parity_table(found: Sequence[Parity]) -> Table:
    table = Table(title="Rollout engine against trainer")
    for name in ("record", "prompt tokens", "vision tokens", "grids (t, h, w)", "frames (s)", "next position",
                 "same ids", "mean |d logp|", "largest", "beyond 0.01", "first at"):  # fmt: skip
        table.add_column(name, justify="left" if name == "record" else "right")
    for each in found:
        times = f"{each.times[0][0]:.2f} to {each.times[-1][1]:.2f}" if each.times else "-"
        numbers = [each.numbers.get(f"engine/{name}") for name in ("logprob_diff", "logprob_diff_max", "noticeable")]
        table.add_row(
            each.record.id,
            str(each.tokens),
            str(each.vision_tokens),
            " ".join(str(tuple(grid)) for grid in each.grids) or "-",
            times,
            str(each.position),
            "yes" if each.same_prompt else "no",
            *("-" if value is None else f"{value:.2g}" for value in numbers),
            "-" if each.place is None else f"response {each.place[0]}, token {each.place[1]}",
        )
    return table
