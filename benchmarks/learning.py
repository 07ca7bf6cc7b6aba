"""Does it learn better? python -m benchmarks.learning [--task moment --seeds 12 --steps 10 --jobs 2]

GRPO, DAPO, APPO with each way of choosing frames, and controls that take away one thing at a time, on a bundled task:
same clips, same warm start, same order of prompts, same number of sampled responses, one training seed for all of them.
Each seed is a process with one thread; runs that are done are not run again, so an interrupted benchmark goes on. When
all are done, the means and 95% intervals of the paired differences to GRPO (or to --base) go to results/learning.* (of
another task: results/learning-TASK.*). Others by name, --variants vppo ral ..., or FILE.py:NAME, a rule of one's own
(docs/own_method.md): with --name -, which leaves the results of the page alone.

Tasks:
  moment  One short moment of a clip shows the answer (the demo's clips); right and wrong responses mostly look at
          the same frames.
  cue     Every time of a clip shows another colour, and a mark that is hard to read says which time is meant. A
          response writes a time, and that decides where it looks for the colour: right and wrong responses look at
          different frames, which is what `hard`, the paper's difference of sets, goes by.
  verbose-0, verbose-WORDSxOF  The clips of one kind of "moment", answered at length: so many irrelevant words around
          what was seen, drawn from so many (docs/credit.md).

Time: a warm start with its clips takes two to three minutes of a core, a run 20 to 25 seconds (less for "cue"), so the
default of 12 seeds x 10 variants takes about half an hour on two cores. With less time take fewer --seeds, not fewer
--steps: the differences are paired by seed.

Clips and warm starts are of seeds that no setting was chosen on; nothing is chosen on the held-out splits here.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from appo.config import APPOConfig
from appo.data.load import load_records
from appo.data.prompts import PromptBuilder
from appo.demo import SETTINGS as DEMO_SETTINGS
from appo.demo import make_clips, short_name, stage, warm_start
from appo.method.selection import select_frames
from appo.tasks.named import TASKS
from appo.train.evaluate import evaluate
from appo.train.groups import whole_groups
from appo.train.setup import load_model
from appo.train.trainer import Trainer
from benchmarks import harness, plots
from benchmarks.learning_variants import OTHERS, VARIANTS, find_variant

# The results that the page shows are of models with these positions.
SETTINGS = DEMO_SETTINGS | {"video_positions": "transformers"}
FIRST_CLIP_SEED = 7000  # far from those of the demo and of tests
# Two-sided 95% quantiles of Student's t by degrees of freedom.
STUDENT = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201,
    12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 19: 2.093, 23: 2.069, 29: 2.045,
}  # fmt: skip
SPLITS = ("validation", "ood")
# What is compared, by where a run's result has it. training: the mean over all sampled responses, how fast it went.
MEASURES = {"validation": "validation/after", "ood": "ood/after", "training": "train/accuracy"}
# Metrics of training that say what was picked.
SELECTION = ("frames/empty", "frames/precision", "frames/recall", "weight/share")


def prepare(work: Path, task: str, number: int) -> tuple[Path, Path]:
    """Clips and warm start ``number``; made once."""
    seed, options = FIRST_CLIP_SEED + number, TASKS[task]
    clips = stage("clips", work / f"clips-{number}", lambda folder: make_clips(folder, seed, **options.clips))
    warm = stage(
        "warm start",
        work / f"warm-{number}",
        lambda folder: warm_start(folder, clips, seed, settings=SETTINGS, **options.warm),
    )
    return clips, warm


def run_one(options: argparse.Namespace, variant: str, seed: int, builder: PromptBuilder | None) -> PromptBuilder:
    """One training run and its held-out accuracy, in ``options.work``/<variant>-<seed>.json.

    builder: of an earlier run of the seed, whose clips are decoded already; returns that of this run.
    """
    work, task, steps = options.work, options.task, options.steps
    clips, warm = prepare(work, task, seed % options.warm_starts)
    functions, changes = find_variant(variant)
    output = work / f"{short_name(variant)}-{seed}"
    settings = SETTINGS | TASKS[task].settings | {"preset": "paper"} | changes
    settings |= {"seed": seed, "max_steps": steps, "output": str(output), "model": str(warm), "tensorboard": False}
    settings |= {"data": str(clips / "train.json"), "save_every": 0}
    config = APPOConfig.from_dict(settings, options.set if ".py:" in variant else [])
    shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
    model, processor = load_model(config)
    trainer = Trainer(model, processor, load_records(config.data), config=config, **functions)
    trainer.build_prompt = builder or trainer.build_prompt
    held_out = {split: load_records(clips / f"{split}.json") for split in SPLITS}

    def measure(moment: str) -> dict[str, float]:
        values = {
            split: evaluate(trainer.model, processor, records, config, builder=trainer.build_prompt)
            for split, records in held_out.items()
        }
        return {f"{split}/{moment}": value["accuracy"] for split, value in values.items()}

    result = {"task": task, "variant": short_name(variant), "seed": seed, "steps": steps, "commit": harness.commit()}
    start = time.perf_counter()
    if variant == options.base:  # all variants of a seed start from the same model
        result |= measure("before")
    trainer.train()
    result |= measure("after") | {"seconds": time.perf_counter() - start}
    history = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for name in ("accuracy", *SELECTION):
        values = [entry[name] for entry in history if name in entry]
        if values:
            result[f"train/{name}"] = statistics.fmean(values)
    path = work / f"{short_name(variant)}-{seed}.json"
    path.with_suffix(".partial").write_text(json.dumps(result) + "\n")
    path.with_suffix(".partial").rename(path)
    print(variant, seed, flush=True)
    return trainer.build_prompt


def where_they_look(work: Path, task: str, number: int) -> dict[str, float]:
    """Frames that right and wrong responses look at, in those of 64 groups of warm start ``number`` that have both.

    right, wrong: the share of responses that have a labelled frame among their K2 most attended ones, the psi of
    `select_frames`. hard-empty: the share of groups in which the difference of sets is empty. hard-precision:
    the share of the frames picked in the others that are labelled. chance: the share of all frames that are.
    """
    clips, warm = prepare(work, task, number)
    settings = SETTINGS | TASKS[task].settings | {"preset": "paper", "prompts_per_step": 64, "model": str(warm)}
    settings |= {"data": str(clips / "train.json"), "output": str(work / f"looking-{number}"), "tensorboard": False}
    config = APPOConfig.from_dict(settings)
    model, processor = load_model(config)
    trainer = Trainer(model, processor, load_records(config.data), config=config)
    groups = trainer.reward(trainer.rollout(64))
    trainer.score(whole_groups(groups))
    trainer.select(groups)
    found: dict[str, list[float]] = {name: [] for name in ("right", "wrong", "hard-empty", "hard-precision", "chance")}
    how = {"top_tokens": config.top_tokens, "top_frames": config.top_frames}
    for group in groups:
        if group.mass is None or group.target_frames is None or group.accuracy.min() == group.accuracy.max():
            continue
        labelled = set(group.prompt.labelled_frames())
        for mass, mask, accuracy in zip(group.mass, group.mask, group.accuracy, strict=True):
            seen = select_frames(mass[None], mask[None], torch.ones(1), strategy="all", **how)
            found["right" if accuracy >= 0.5 else "wrong"].append(float(bool(labelled & set(seen.tolist()))))
        picked = set(group.target_frames.tolist())
        found["hard-empty"].append(float(not picked))
        found["hard-precision"] += [float(frame in labelled) for frame in picked]
        found["chance"].append(len(labelled) / group.prompt.num_frames)
    return {"warm start": number, "groups": len(found["chance"])} | {
        name: statistics.fmean(values) for name, values in found.items() if values
    }


def missing(options: argparse.Namespace, seed: int) -> list[str]:
    """The variants of a seed that have no result yet."""
    return [name for name in options.variants if not (options.work / f"{short_name(name)}-{seed}.json").is_file()]


def run_all(options: argparse.Namespace) -> None:
    """Run what is missing, ``options.jobs`` processes at a time: first warm starts, then a process for each seed."""

    def start(name: str, *arguments: object) -> None:
        command = [sys.executable, "-m", "benchmarks.learning", *map(str, arguments), "--task", options.task]
        command += ["--work", str(options.work.parent), "--variants", *options.variants]
        command += ["--base", options.base, "--warm-starts", str(options.warm_starts), "--steps", str(options.steps)]
        command += ["--set", *options.set]
        log = options.work / f"{name}.log"
        with log.open("w") as file:
            code = subprocess.run(
                command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
            ).returncode
        if code:
            raise SystemExit(f"{name}: ended with {code}; see {log}")
        print(name, flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        numbers = range(min(options.warm_starts, options.seeds))
        list(pool.map(lambda number: start(f"warm-start-{number}", "--prepare", number), numbers))
        seeds = [seed for seed in range(options.seeds) if missing(options, seed)]
        list(pool.map(lambda seed: start(f"seed-{seed}", "--run", seed), seeds))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95% interval by Student's t."""
    if len(values) < 2:
        return values[0], math.inf
    freedom = max(known for known in STUDENT if known <= len(values) - 1)  # the next smaller one is the wider one
    return statistics.fmean(values), STUDENT[freedom] * statistics.stdev(values) / math.sqrt(len(values))


def summarise(
    results: list[dict[str, Any]], variants: Sequence[str], seeds: int, base: str = "grpo"
) -> list[dict[str, Any]]:
    """A row per variant: each of `MEASURES`, and the paired difference to ``base``, mean and half width."""
    table = {(result["variant"], result["seed"]): result for result in results}
    rows = []
    for variant in variants:
        row: dict[str, Any] = {"task": table[variant, 0]["task"], "variant": variant, "seeds": seeds}
        for name, place in MEASURES.items():
            values = [table[variant, seed][place] for seed in range(seeds)]
            other = [table[base, seed][place] for seed in range(seeds)]
            difference, width = interval([a - b for a, b in zip(values, other, strict=True)])
            row |= {name: statistics.fmean(values), f"{name}-{base}": difference, f"{name} 95%": width}
        for name in SELECTION:
            values = [table[variant, seed].get(f"train/{name}") for seed in range(seeds)]
            known = [value for value in values if value is not None]
            row[name] = statistics.fmean(known) if known else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="moment", help="which clips; described above")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="a task's clips and runs: WORK/TASK")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--warm-starts", type=int, default=3, help="seeds take these in turn")
    parser.add_argument("--steps", type=int, default=10, help="training steps of a run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), help=f"of {', '.join([*VARIANTS, *OTHERS])}, or FILE.py:NAME"
    )
    parser.add_argument("--set", nargs="*", default=[], help="settings of a rule FILE.py:NAME: key=value ...")
    parser.add_argument("--base", choices=[*VARIANTS, *OTHERS], default="grpo", help="what differences are taken to")
    parser.add_argument("--run", type=int, metavar="SEED", help="the variants of one seed, in this process")
    parser.add_argument("--name", help="of the result files (default: learning, or learning-TASK); '-': none")
    parser.add_argument("--prepare", type=int, metavar="NUMBER", help="one warm start, in this process")
    options = parser.parse_args()
    options.name = options.name or ("learning" if options.task == "moment" else f"learning-{options.task}")
    options.work = options.work / options.task
    options.work.mkdir(parents=True, exist_ok=True)
    if options.prepare is not None:
        prepare(options.work, options.task, options.prepare)
        return
    options.variants = list(dict.fromkeys([options.base, *options.variants]))
    try:
        for name in options.variants:
            find_variant(name)
    except ValueError as error:
        parser.error(str(error))
    variants = [short_name(name) for name in options.variants]
    if options.run is not None:
        builder = None
        for variant in missing(options, options.run):
            builder = run_one(options, variant, options.run, builder)
        return
    run_all(options)
    results = [
        json.loads((options.work / f"{variant}-{seed}.json").read_text())
        for variant in variants
        for seed in range(options.seeds)
    ]
    if any(result["steps"] != options.steps for result in results):
        raise SystemExit(f"{options.work} has runs of another number of steps; use another --work.")
    looks = [where_they_look(options.work, options.task, n) for n in range(min(options.warm_starts, options.seeds))]
    rows = summarise(results, variants, options.seeds, options.base)
    for row in rows:
        parts = (f"{m} {row[m]:.3f} ({row[f'{m}-{options.base}']:+.3f} +- {row[f'{m} 95%']:.3f})" for m in MEASURES)
        print(f"{row['variant']:22s}", *parts)
    for row in looks:
        print("  ".join(f"{name} {round(value, 2)}" for name, value in row.items()))
    if options.name != "-":
        commits = sorted({result["commit"] for result in results})
        more = {"commits": commits, "runs": results, "looks": looks, "steps": options.steps}
        path = harness.save(options.name, rows, device="cpu", **more)
        others = [row for row in rows if row["variant"] != options.base]
        points = {
            name: [(row["variant"], 100 * row[f"{name}-{options.base}"], 100 * row[f"{name} 95%"]) for row in others]
            for name in MEASURES
        }
        plots.differences(points, path.with_suffix(".png"))
        print(f"written: {path}, .csv, .png")


if __name__ == "__main__":
    main()
