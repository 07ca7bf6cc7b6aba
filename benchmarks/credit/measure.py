"""The pre-registered measurement of credit: python -m benchmarks.credit.measure [--task verbose-48x4 --groups 1000]

benchmarks/credit/PREREGISTRATION.md says what is measured and why. For each of --seeds it renders clips, makes a warm
start, checks that it counts (--check), and measures its groups in units of 16 prompts, the warm starts in turn, until
each has --groups or --minutes of this call have passed. Everything is kept in --work, and the same command goes on.
"""

import argparse
import json
from pathlib import Path

from appo.config import APPOConfig
from appo.data.load import load_records
from appo.demo import SETTINGS, make_clips, stage, warm_start
from appo.tasks.named import TASKS
from appo.tasks.thoughts import telling_spans
from appo.train.setup import load_model
from appo.train.trainer import Trainer

SEEDS = (300, 301, 302)
CLIPS = {"warmup": 512, "train": 1536}
MOST_LACKING = 0.02  # share of responses without the telling sentence
CHECKED = 64  # prompts


def prepare(work: Path, task: str, seed: int) -> Path:
    """The folder of a warm start with its clips and settings; made once."""
    options, folder = TASKS[task], work / f"{task}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    clips = stage(
        "clips", work / f"clips-{seed}", lambda path: make_clips(path, seed, **options.clips | {"sizes": CLIPS})
    )
    warm = stage("warm start", folder / "warm", lambda path: warm_start(path, clips, seed, **options.warm))
    settings = SETTINGS | options.settings | {"preset": "paper", "seed": seed, "tensorboard": False}
    settings |= {"model": str(warm), "data": str(clips / "train.json"), "output": str(folder / "run")}
    APPOConfig.from_dict(settings).save(folder / "config.yaml")
    return folder


def check(folder: Path) -> dict[str, float]:
    """Whether a warm start counts, by responses to its first prompts, which the measurement samples anew."""
    path = folder / "check.json"
    if not path.is_file():
        config = APPOConfig.load(folder / "config.yaml")
        model, processor = load_model(config)
        trainer = Trainer(model, processor, load_records(config.data), config=config)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", choices=[name for name in TASKS if name.startswith("verbose")], default="verbose-48x4"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of clips, model and warm start")
    parser.add_argument("--work", type=Path, default=Path("runs/credit"))
    options = parser.parse_args()
    for seed in options.seeds:
        found = check(prepare(options.work, options.task, seed))
        print(
            f"warm start {seed}: {found['lacking']:.1%} of {found['responses']} responses lack the sentence, "
            f"accuracy {found['accuracy']:.3f}",
            flush=True,
        )
        if found["lacking"] >= MOST_LACKING:
            raise SystemExit(f"warm start {seed} does not count: expected less than {MOST_LACKING:.0%}.")


if __name__ == "__main__":
    main()
