"""`appo credit RUN`: the measurement on a user's own run or checkpoint."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from appo.config import APPOConfig, ConfigError
from appo.credit import report
from appo.credit.blocks import blocks
from appo.credit.collect import Collector, Unit, load_unit, save_unit, unit_path
from appo.credit.evidence import FindSpans
from appo.credit.weightings import BASE
from appo.data.load import check_media, load_records
from appo.data.records import Record
from appo.rollout.user_code import user_function
from appo.tasks.dataset import SOURCE
from appo.tasks.thoughts import telling_spans
from appo.train.setup import load_model
from appo.train.trainer import Trainer

LEAST_GROUPS = 16


def measure_run(
    run: Path,
    output: Path,
    *,
    groups: int,
    told: str = "auto",
    overrides: Sequence[str] = (),
    show: Callable[[str], None] = print,
) -> Path:
    """Measure ``groups`` groups with rewards that differ, or all prompts twice over, and return the table's file.

    run: a run folder, whose ``final`` model and settings are measured, or a YAML file of settings. told: "auto" (the
    bundled tasks' sentence, where all records are of them), "none", or FILE.py:NAME, a function of the text of a
    response and its `Record` that returns (start, end) of every place that tells what was seen. The same call goes on
    where it was interrupted. Raises ConfigError.
    """
    config, records = load_run(run, overrides)
    find = find_function(told, records)
    model, processor = load_model(config)
    trainer = Trainer(model, processor, records, config=config)
    collector = Collector(trainer, find=find, identity={"settings": fingerprint(config), "told": told})
    output.mkdir(parents=True, exist_ok=True)
    units: list[Unit] = []
    done, most = 0, max(2, 2 * len(records) // config.prompts_per_step)
    while done < groups and len(units) < most:
        path = unit_path(output, len(units))
        if not path.is_file():
            save_unit(collector.unit(len(units)), path)
        units.append(load_unit(path, collector.key))
        done += len(units[-1].records)
        show(f"{done} of {groups} groups, {units[-1].totals['cpu']:.0f} s of CPU for the last {len(units[-1].records)}")
    if done < LEAST_GROUPS:
        raise ConfigError(
            f"credit: expected at least {LEAST_GROUPS} groups whose rewards differ, got {done} of "
            f"{sum(int(unit.totals['groups']) for unit in units)}. Take prompts that the model answers now right, now "
            "wrong."
        )
    return write_table(output, units, reference="only-told" if find else BASE)


def write_table(output: Path, units: list[Unit], *, reference: str) -> Path:
    """credit.md and credit.json in ``output``."""
    result = report.compare([blocks(units)], reference=reference)
    found, sums = report.hits([units]), report.totals([units])
    text = [
        f"{result['groups'][0]} groups of {sums['groups']:.0f}; accuracy {sums['accuracy'] / sums['responses']:.3f}; "
        f"{sums['tokens'] / sums['responses']:.1f} tokens a response; {sums['cpu']:.0f} s of CPU.",
        f"Reference: the mean gradient of `{reference}`. Values with 95 % intervals; what they mean: docs/credit.md.",
        "",
        *report.table(result, found),
    ]
    path = output / "credit.md"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps({"comparison": result, "hits": found, "totals": sums}, indent=1))
    return path


def load_run(run: Path, overrides: Sequence[str]) -> tuple[APPOConfig, Sequence[Record]]:
    """The settings of a run folder with its trained model, or those of a file; and its records."""
    if run.is_dir():
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"`run`: expected a run folder with config.yaml, or a YAML file, got {run}.")
        config = APPOConfig.load(run / "config.yaml", list(overrides))
        if not any(item.startswith("model=") for item in overrides):
            if not (run / "final").is_dir():
                raise ConfigError(
                    f"`run`: {run} is not finished and has no `final`. Pass the model to measure: model=FOLDER, such "
                    f"as the one it started from, {config.model}."
                )
            config = replace(config, model=str(run / "final"))
    else:
        config = APPOConfig.load(run, list(overrides))
    # Mass is recorded, the model itself samples, and nothing is written into the run.
    config = replace(config, method="appo", engine="transformers", tensorboard=False)
    if not config.data:
        raise ConfigError("`data`: expected records, got nothing. Pass data=train.json.")
    records = load_records(
        config.data, data_root=config.data_root, seed=config.seed, allow_outside=config.allow_outside
    )
    if config.on_broken == "stop":
        check_media(records)
    return config, records


def fingerprint(config: APPOConfig) -> str:
    """A hash of the settings that decide what is measured."""
    settings = config.to_dict()
    for name in ("output", "decode_timeout", "prompt_cache_gib", "frame_cache", "frame_cache_gib"):
        settings.pop(name)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def find_function(told: str, records: Sequence[Record]) -> FindSpans | None:
    """The function that finds the evidence of a response; see `measure_run`."""
    if told == "none":
        return None
    if told == "auto":
        ours = all(record.meta.get("data_source") == SOURCE for record in records)
        return telling_spans if ours else None
    file, colon, _ = told.rpartition(":")
    if not colon or not file.endswith(".py") or not Path(file).is_file():
        raise ConfigError(f"`told`: expected auto, none or FILE.py:NAME of a file that exists, got {told!r}.")
    try:
        function = user_function(told, "told")
    except ValueError as error:
        raise ConfigError(f"`told`: {error}") from error

    def find(text: str, record: Record) -> dict[str, tuple[int, int]] | None:
        spans = function(text, record)
        if not spans:
            return None
        return dict(spans) if isinstance(spans, dict) else {f"place {i}": tuple(s) for i, s in enumerate(spans)}

    return find
