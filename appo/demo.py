"""`appo demo`: the whole job on clips of our own and a tiny Qwen2.5-VL, in minutes on a CPU.

Stages, each left alone when its result is there: clips -> warm start -> training (with APPO, then with GRPO) -> pages.
What the demo shows is the method at work on a task where one short moment of a clip decides the answer.
"""

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from appo.config import APPOConfig, ConfigError
from appo.constraints import suggestion
from appo.data.load import load_records
from appo.data.prompts import PromptBuilder
from appo.data.records import Record
from appo.models.positions import use_positions
from appo.presets import PRESETS
from appo.reports.inspect_clip import draw_group, sample_group
from appo.reports.run_report import write_report
from appo.reports.runs import Run, read_runs
from appo.reports.story import picked
from appo.rollout.registry import check_user_code
from appo.tasks.named import TASKS
from appo.train.setup import load_model
from appo.train.trainer import Trainer

console = Console()

# What `appo.APPOConfig` says of each field holds; rates and steps suit a model of a million parameters.
SETTINGS: dict[str, Any] = {
    "instructions": False,
    "fps": 4.0,
    "max_frames": 16,
    "max_pixels": 28 * 28,
    "group_size": 8,
    "prompts_per_step": 16,
    "max_new_tokens": 24,
    "rewards": {"accuracy": 0.9, "format": 0.1},
    "updates_per_step": 2,
    "micro_groups": 8,
    "learning_rate": 3e-4,
    "lr_schedule": "linear",
    "adam_beta2": 0.99,
    "warmup_steps": 3,
    "top_tokens": 5,
    "top_frames": 2,
    "slot_tokens": 8,
    "dtype": "float32",
    "freeze_vision": False,
    "eval_every": 18,
    "eval_batch": 64,
    "eval_samples": 4,
    "save_every": 18,
    "sample_every": 12,
}

CLOSEUPS, TRIED = 3, 16  # clips that are drawn up close, of so many

# APPO picks the frames of right answers ("soft"). "hard" takes those of wrong answers away, and here both mostly look
# at the same moment: it would pick nothing in five groups of six (docs/performance.md).
METHODS: dict[str, dict[str, Any]] = {
    "appo": {"preset": "paper", "strategy": "soft"},
    **{name: {"preset": name} for name in PRESETS if name != "paper"},
}


def method_settings(method: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of one of `METHODS`, or of a rule FILE.py:NAME (docs/own_method.md).

    overrides: ``key=value``, which are checked beside them. Raises ConfigError, or UserCodeError for a file.
    """
    if method not in METHODS and ".py" not in method:
        known = f"one of {', '.join(METHODS)}, or FILE.py:NAME"
        raise ConfigError(f"`method`: expected {known}, got {method!r}.{suggestion(method, METHODS)}")
    settings = METHODS.get(method, {"method": method})
    found = APPOConfig.from_dict(SETTINGS | settings, list(overrides))
    for name in ("model", "data", "output"):
        if getattr(found, name) != getattr(APPOConfig(), name):
            raise ConfigError(f"`{name}`: expected none, got {getattr(found, name)!r}: the demo makes its own.")
    check_user_code(found.rewards, found.method)
    return settings


def short_name(method: str) -> str:
    """``method`` as it stands in the names of folders and in lines: of FILE.py:NAME the function's."""
    return method.rpartition(":")[2]


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    steps: int = 36,
    method: str = "appo",
    overrides: Sequence[str] = (),
    compare: bool = True,
    engine: str = "transformers",
    vllm_python: str = "",
    task: str = "moment",
) -> Path:
    """Run every stage that has not been run and return the page to open.

    task: one of `appo.tasks.named.TASKS`; the folders of another than "moment" end in its name.
    method, overrides: see `method_settings`. compare: train with GRPO too, from the same warm start on the same
    questions. engine: what samples (docs/engines.md). vllm_python: interpreter of the environment whose vLLM serves it.
    """
    sampler = engine_settings(engine, vllm_python)
    APPOConfig(**sampler)  # what is missing is said before anything is made
    methods = {method: method_settings(method, overrides)}
    if compare:
        methods.setdefault("grpo", METHODS["grpo"])  # as it is, beside the method with its overrides
    if task not in TASKS:
        raise ConfigError(f"`task`: expected one of {', '.join(TASKS)}, got {task!r}.{suggestion(task, TASKS)}")
    options, end = TASKS[task], "" if task == "moment" else f"-{task}"
    started = time.perf_counter()
    torch.set_num_threads(1)  # the model is so small that a second thread costs more than it brings
    with own_lines_only():
        clips = stage("clips", output / f"data{end}", lambda folder: make_clips(folder, seed, **options.clips))
        warm = stage(
            "warm start", output / f"warm{end}", lambda folder: warm_start(folder, clips, seed, **options.warm)
        )
        folders = []
        for name, own in methods.items():
            called = short_name(name)
            run = output / (f"run-{called}{end}" if engine == "transformers" else f"run-{called}-{engine}{end}")
            console.print(f"training: {called.upper() if name in METHODS else called}, {run}")
            settings = own | options.settings | {"seed": seed, "max_steps": steps} | sampler
            changes = overrides if name == method else ()
            folders.append(train(run, clips, warm, settings=settings, overrides=changes))
        page = write_report(folders, output / f"report{end}.html")
        for line in summary(read_runs(folders)):
            console.print(line, highlight=False)
    console.print(f"Done in {time.perf_counter() - started:.0f} s. Open [bold]{page}[/bold]")
    return page


@contextmanager
def own_lines_only() -> Iterator[None]:
    """Keep progress bars, notes and warnings of libraries out of the demo's lines; errors are raised as ever."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def stage(name: str, folder: Path, make: Callable[[Path], None]) -> Path:
    """Make ``folder`` unless it is there; it gets its name only once it is complete."""
    if folder.is_dir():
        console.print(f"{name}: using {folder}")
        return folder
    start = time.perf_counter()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    partial.rename(folder)
    console.print(f"{name}: {folder} ({time.perf_counter() - start:.0f} s)")
    return folder


def make_clips(folder: Path, seed: int, **options: Any) -> None:
    """options: of `appo.tasks.make_task`."""
    from appo.tasks import make_task

    with console.status("rendering and encoding clips"):
        make_task(folder, seed=seed, **options)


def warm_start(
    folder: Path,
    clips: Path,
    seed: int,
    *,
    model_options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """A tiny Qwen2.5-VL that has learned the answer format on the easy split, saved as transformers saves models.

    model_options: of `appo.tasks.tiny.build_tiny`. settings: what differs from `SETTINGS`. options: of
    `appo.tasks.warmup.warm_up`.
    """
    from appo.tasks.tiny import build_tiny
    from appo.tasks.warmup import warm_up

    model, processor = build_tiny(seed, **(model_options or {}))
    config = APPOConfig.from_dict(SETTINGS | (settings or {}))
    use_positions(model, config.video_positions)
    builder = PromptBuilder(processor, model.config, config)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console) as progress:
        records = load_records(clips / "warmup.json")
        decoding = progress.add_task("decoding clips", total=len(records))
        prompts = []
        for record in records:
            prompts.append(builder(record))
            progress.advance(decoding)
        teaching = progress.add_task("warm start", total=None)

        def show(step: int, loss: float, moments: float) -> None:
            progress.update(teaching, completed=step, description=f"warm start, loss {loss:.2f}")

        warm_up(model, processor, prompts, seed=seed, progress=show, **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def engine_settings(engine: str, vllm_python: str = "") -> dict[str, Any]:
    """``engine``, sized for the tiny model."""
    if engine == "transformers":
        return {}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; of vLLM's CPU build
    arguments = {"enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 256, "gpu_memory_utilization": 0.3}
    return {"engine": engine, "vllm_python": vllm_python, "vllm_arguments": json.dumps(arguments)}


def train(run: Path, clips: Path, warm: Path, *, settings: dict[str, Any], overrides: Sequence[str] = ()) -> Path:
    """Train on the hard split and answer the held-out splits before and after; with APPO, draw a few clips up close.

    settings: seed, max_steps, the method's, and what else differs from `SETTINGS`. overrides: ``key=value``.
    """
    where = {"model": str(warm), "data": str(clips / "train.json"), "output": str(run)}
    short = {"warmup_steps": min(SETTINGS["warmup_steps"], settings["max_steps"])}
    config = APPOConfig.from_dict(SETTINGS | where | short | settings, list(overrides))
    held_out = {split: load_records(clips / f"{split}.json") for split in ("validation", "ood")}
    model, processor = load_model(config)
    trainer = Trainer(model, processor, load_records(config.data), config=config, eval_dataset=held_out)
    try:
        trainer.train()
    finally:
        trainer.close()
    if config.method == "appo":
        stage(
            "close-ups",
            run / "inspect-before-training",
            lambda folder: draw_closeups(folder, config, held_out["validation"]),
        )
    return run


def draw_closeups(folder: Path, config: APPOConfig, held_out: Sequence[Record]) -> None:
    """Held-out clips as the warm start sees them, those first to which it gives right and wrong answers."""
    model, processor = load_model(config)
    with tempfile.TemporaryDirectory() as unused:
        records = [held_out[index] for index in range(min(TRIED, len(held_out)))]
        own = replace(config, output=unused, engine="transformers", asynchronous=False)
        trainer = Trainer(model, processor, records, config=own)
        groups = [sample_group(trainer, record) for record in records]
        for group in sorted(groups, key=lambda group: not group.informative)[:CLOSEUPS]:
            draw_group(trainer, group, folder / group.prompt.record.id)


def summary(runs: list[Run]) -> list[str]:
    """Lines on what each run picked, beside what as many frames drawn at random would be, and on held-out accuracy."""
    lines = []
    for run in runs:
        found = picked(run)
        if found:
            lines.append(f"What {run.method} picked, mean over {len(run.metrics)} steps:")
        for figure in found:
            chance = "" if figure.chance is None else f"  ({figure.chance:.0%} by chance)"
            lines.append(f"  {figure.name.lower():30} {figure.value:4.0%}{chance}")
    lines.append("Held-out accuracy, before and after" + (" (one seed: a few points are chance):" if runs[1:] else ":"))
    for run in runs:
        values = run.evaluation_series("accuracy")[1]
        lines.append(f"  {run.method:30} {values[0]:4.0%} -> {values[-1]:.0%}")
    return lines
