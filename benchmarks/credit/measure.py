"""The pre-registered measurements of credit: python -m benchmarks.credit.measure [--study verbose-48x4 --groups 1000]

benchmarks/credit/PREREGISTRATION.md says what is measured and why, benchmarks/credit/studies.py has it as data. For
each of --seeds it renders clips, makes a warm start, checks that it counts, and measures its groups in units of 16
prompts, the warm starts in turn, until each has --groups, or --minutes of this call have passed. Everything is kept in
--work, and the same command goes on. At the end, or with --groups 0 at once, all units that are there go to
results/credit-STUDY.npz (inner products of the units' gradients, from which `python -m benchmarks.credit.results` makes
the tables) and .json (counts).
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from appo.config import APPOConfig
from appo.credit.blocks import blocks, save_blocks
from appo.credit.collect import Collector, Unit, load_unit, save_unit, unit_path
from appo.credit.command import fingerprint
from appo.credit.report import hits, totals
from appo.credit.weightings import WEIGHTINGS
from appo.data.load import load_records
from appo.demo import SETTINGS, make_clips, stage, warm_start
from appo.tasks.named import TASKS
from appo.tasks.thoughts import telling_spans
from appo.train.setup import load_model
from appo.train.trainer import Trainer
from benchmarks import harness
from benchmarks.credit.studies import MAIN, STUDIES, Study

CLIPS = {"warmup": 512, "train": 1536}
MOST_LACKING = 0.02  # share of responses without the telling sentence
CHECKED = 64  # prompts


def prepare(work: Path, task: str, seed: int) -> Path:
    """The folder of a warm start with its clips and settings; made once."""
    options, folder = TASKS[task], work / f"{task}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = options.clips | {"sizes": CLIPS}
    clips = stage("clips", work / f"clips-{seed}", lambda path: make_clips(path, seed, **sizes))
    warm = stage("warm start", folder / "warm", lambda path: warm_start(path, clips, seed, **options.warm))
    settings = SETTINGS | options.settings | {"preset": "paper", "seed": seed, "tensorboard": False}
    settings |= {"model": str(warm), "data": str(clips / "train.json"), "output": str(folder / "run")}
    APPOConfig.from_dict(settings).save(folder / "config.yaml")
    return folder


def trainer_of(folder: Path) -> Trainer:
    config = APPOConfig.load(folder / "config.yaml")
    return Trainer(*load_model(config), load_records(config.data), config=config)


def check(trainer: Trainer, folder: Path) -> dict[str, float]:
    """Whether a warm start counts, by responses to its first prompts."""
    path = folder / "check.json"
    if not path.is_file():
        groups = trainer.reward(trainer.rollout(CHECKED))
        tells = [telling_spans(text, group.prompt.record) is not None for group in groups for text in group.texts]
        found = {
            "responses": len(tells),
            "lacking": 1 - sum(tells) / len(tells),
            "accuracy": sum(float(group.accuracy.mean()) for group in groups) / len(groups),
            "informative": sum(group.informative for group in groups) / len(groups),
        }
        path.write_text(json.dumps(found) + "\n")
    values: dict[str, float] = json.loads(path.read_text())
    return values


def identity(config: APPOConfig, first: int = 0) -> dict[str, Any]:
    """The key that units of one measurement share, wherever the folders lie."""
    found: dict[str, Any] = {"settings": fingerprint(replace(config, model="warm", data="train.json"))}
    return found | ({"first": first} if first else {})


def units_of(folder: Path, key: dict[str, Any] | None = None) -> Iterator[Unit]:
    """The units of a warm start that are there, one after another."""
    number = 0
    while (path := unit_path(folder, number)).is_file():
        yield load_unit(path, key)
        number += 1


def measure(study: Study, folders: dict[int, Path], trainers: dict[int, Trainer], groups: int, minutes: float) -> None:
    """Unit after unit, the warm starts in turn, into the folders."""
    end = time.monotonic() + 60 * minutes
    rows = {name: WEIGHTINGS[name] for name in study.rows}
    collectors = {
        seed: Collector(each, find=telling_spans, weightings=rows, identity=identity(each.config, study.first))
        for seed, each in trainers.items()
    }
    done = {seed: [len(unit.records) for unit in units_of(folder, collectors[seed].key)]
            for seed, folder in folders.items()}  # fmt: skip
    while time.monotonic() < end:
        open_ = [seed for seed in folders if sum(done[seed]) < groups]
        if not open_:
            return
        seed = min(open_, key=lambda seed: len(done[seed]))
        unit = collectors[seed].unit(study.first + len(done[seed]))
        save_unit(unit, unit_path(folders[seed], len(done[seed])))
        done[seed].append(len(unit.records))
        counts = ", ".join(f"{seed}: {sum(sizes)}" for seed, sizes in done.items())
        print(f"{counts} groups; the last unit took {unit.totals['cpu']:.0f} s of CPU", flush=True)


def passed_on(folder: Path, kept: list[Unit]) -> Iterator[Unit]:
    """The units of a warm start; ``kept`` has them without sketches, of which a thousand groups' take a gigabyte."""
    for unit in units_of(folder):
        yield unit
        unit.sketches = torch.empty(0)
        kept.append(unit)


def write(folders: dict[int, Path], checks: dict[int, dict[str, float]], study: Study, groups: int, name: str) -> None:
    """results/NAME.npz and .json of all units that are there. checks: of the warm starts."""
    rows = {row: WEIGHTINGS[row] for row in study.rows}
    kept: dict[str, list[Unit]] = {}
    models = {}
    for seed, folder in folders.items():
        kept[str(seed)] = []
        models[str(seed)] = blocks(passed_on(folder, kept[str(seed)]), whole=True, weightings=rows)
    path = harness.RESULTS / f"{name}.npz"
    save_blocks(path, models)
    content = {
        "task": study.task, "groups_asked": groups, "environment": harness.environment("cpu", 1),
        "warm_starts": {str(seed): found for seed, found in checks.items()},
        "records": {seed: [unit.records for unit in units] for seed, units in kept.items()},
        "totals": {seed: totals([units]) for seed, units in kept.items()},
        "hits": hits(list(kept.values())),
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}, .json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), default=MAIN)
    parser.add_argument("--seeds", type=int, nargs="+", help="of clips, model and warm start (default: the study's)")
    parser.add_argument("--groups", type=int, help="that differ in rewards, of each warm start (default: the study's)")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no unit after this time")
    parser.add_argument("--work", type=Path, default=Path("runs/credit"))
    parser.add_argument("--name", help="of the result files (default: credit-STUDY)")
    options = parser.parse_args()
    study = STUDIES[options.study]
    seeds, groups = options.seeds or study.seeds, study.groups if options.groups is None else options.groups
    starts = {seed: prepare(options.work, study.task, seed) for seed in seeds}
    trainers = {seed: trainer_of(folder) for seed, folder in starts.items()}
    checks = {}
    for seed, trainer in trainers.items():
        checks[seed] = found = check(trainer, starts[seed])
        lacking = f"{found['lacking']:.1%} of {found['responses']} responses lack the sentence"
        print(f"warm start {seed}: {lacking}, accuracy {found['accuracy']:.3f}", flush=True)
        if found["lacking"] >= MOST_LACKING:
            raise SystemExit(f"warm start {seed} does not count: expected less than {MOST_LACKING:.0%}.")
    # A study of other prompts or rows than those of its task keeps its units apart.
    folders = {seed: start / options.study if options.study != study.task else start for seed, start in starts.items()}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    measure(study, folders, trainers, groups, options.minutes)
    write(folders, checks, study, groups, options.name or f"credit-{options.study}")


if __name__ == "__main__":
    main()
