"""Writing a perception task to disk: mp4 clips, and records in the Video-R1 format with the deciding moments."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from appo.data.options import LETTERS
from appo.tasks.questions import KINDS, NUMBERS, Difficulty, Question
from appo.tasks.render import draw, encode

SOURCE = "appo-tasks"

# The warm start sees the easy split only. Training and validation share a harder distribution; the last split
# is harder still, on a light background that no other split has.
DIFFICULTIES: dict[str, Difficulty] = {
    "warmup": Difficulty(size=(0.17, 0.26)),
    "train": Difficulty(noise=14.0, size=(0.12, 0.17), contrast=0.5, distractors=1),
    "validation": Difficulty(noise=14.0, size=(0.12, 0.17), contrast=0.5, distractors=1),
    "ood": Difficulty(noise=16.0, size=(0.11, 0.16), contrast=0.5, length=0.375, distractors=2, background=85.0),
}
SIZES = {"warmup": 512, "train": 512, "validation": 128, "ood": 128}


def make_task(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    kinds: Sequence[str] = ("colour", "blink"),
    difficulties: Mapping[str, Difficulty] | None = None,
    side: int = 56,
    fps: int = 8,
    duration: float = 4.0,
    shuffle_options: bool = False,
    workers: int = 2,
) -> dict[str, Path]:
    """Renders the clips of every split and writes ``DIR/<split>.json`` and ``DIR/videos/*.mp4``.

    sizes: clips of each split (default ``SIZES``). kinds: question kinds of ``KINDS``, taken in turn; a tiny
    model learns those of the default in a minute. difficulties: of each split, those left out as in
    ``DIFFICULTIES``. side: pixels, even. duration: seconds. shuffle_options: draw the order of the options of
    each question instead of a fixed one.

    Records are in the Video-R1 format (docs/data.md), with ``path`` relative to DIR, and have besides:
    ``time_spans`` [[start, end]] in seconds, the moments that decide the question; ``duration`` in seconds;
    ``task``, the question kind; and those of the kind "cue" ``seen`` [[start, end, word]], what is shown when.
    Returns the path of each split's records.

    A clip depends on the seed, its split and its number only: the same arguments give the same bytes, and a
    larger size keeps the smaller one's clips. Raises ValueError for an unknown kind or split, or sizes that
    cannot be drawn.
    """
    root, sizes = Path(directory), dict(SIZES if sizes is None else sizes)
    levels = {**DIFFICULTIES, **(difficulties or {})}
    _check(sizes, kinds, levels, side)
    (root / "videos").mkdir(parents=True, exist_ok=True)
    written = {}
    for split, size in sizes.items():

        def one(index: int, split: str = split) -> dict[str, Any]:
            rng = np.random.default_rng([seed, *split.encode(), index])
            kind = kinds[index % len(kinds)]
            question = KINDS[kind](rng, levels[split], duration, fps)
            if shuffle_options:
                question = _shuffled(question, rng)
            path = f"./videos/{split}-{index:05d}.mp4"
            encode(draw(question.scene, side=side, fps=fps, duration=duration, rng=rng), root / path, fps=fps)
            return _record(question, f"{split}-{index:05d}", path, duration)

        with ThreadPoolExecutor(workers) as pool:
            records = list(pool.map(one, range(size)))
        written[split] = root / f"{split}.json"
        written[split].write_text(json.dumps(records, indent=1) + "\n")
    return written


def think_text(task: str, steps: Sequence[int], answer: str) -> str:
    """The reasoning of a warm-start response: when it looked, and what it saw.

    steps: temporal grid step of each moment, from 0. answer: the text of the chosen option. For the task "cue"
    the step comes first: what was written there decides where to look for what comes next.
    """
    when = " then ".join(NUMBERS[step] for step in steps)
    if task == "cue":
        return f"i see at time {when} {answer} so the {task} is {answer}"
    return f"i see {answer} at step {when} so the {task} is {answer}"


def response_text(think: str, letter: str) -> str:
    """The response format of docs/data.md."""
    return f"<think> {think}</think><answer>{letter}</answer>"


def _record(question: Question, name: str, path: str, duration: float) -> dict[str, Any]:
    return {
        "problem_id": name,
        "problem": question.problem,
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": [f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False)],
        "solution": f"<answer>{LETTERS[question.answer]}</answer>",
        "path": path,
        "data_source": SOURCE,
        "task": question.kind,
        "time_spans": [list(span) for span in question.spans],
        "duration": duration,
        **({"seen": [list(moment) for moment in question.seen]} if question.seen else {}),
    }


def _shuffled(question: Question, rng: np.random.Generator) -> Question:
    order = rng.permutation(len(question.options)).tolist()
    options = tuple(question.options[i] for i in order)
    return replace(question, options=options, answer=order.index(question.answer))


def _check(sizes: Mapping[str, int], kinds: Sequence[str], levels: Mapping[str, Difficulty], side: int) -> None:
    def wrong(argument: str, expected: str, got: object) -> None:
        raise ValueError(
            f"make_task: `{argument}`: expected {expected}, got {got!r}. See the docstring of appo.tasks.make_task."
        )

    if not kinds or any(kind not in KINDS for kind in kinds):
        wrong("kinds", f"some of {tuple(KINDS)}", tuple(kinds))
    if unknown := [split for split in sizes if split not in levels]:
        wrong("sizes", f"splits with a difficulty, {tuple(levels)}", unknown)
    if any(size < 1 for size in sizes.values()):
        wrong("sizes", "at least one clip a split", dict(sizes))
    if side < 16 or side % 2:
        wrong("side", "an even number of pixels, at least 16", side)
