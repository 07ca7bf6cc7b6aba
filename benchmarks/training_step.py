"""Time of a training step by phase: python -m benchmarks.training_step

Steps of the demo's size (16 prompts x 8 responses of 24 tokens, clips of 16 frames, the tiny Qwen2.5-VL), from
decoding to the optimizer: APPO, APPO with the prompt computed anew for every response, and GRPO, which records nothing.
The model is untrained, so every response runs to its full length; a reward by length gives every group a signal, so
none is left out. Writes results/training-step-<device>.json, .csv and .png.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from appo.config import APPOConfig
from appo.data.load import load_records
from appo.data.records import Record
from appo.demo import SETTINGS
from appo.rollout import rewards
from appo.tasks import make_task
from appo.tasks.tiny import build_tiny
from appo.train.trainer import Trainer
from benchmarks import harness, plots

VARIANTS: dict[str, dict[str, Any]] = {
    "APPO": {},
    "APPO, prompts not shared": {"share_prompt": "off"},
    "GRPO": {"preset": "grpo"},
}
# In the order in which they happen. What remains of a step is what its parts leave over.
PHASES = ("decode", "generate", "score", "weights", "loss", "update")
INSIDE = {"rollout": ("decode", "generate"), "score": ("weights",), "update": ("loss",)}


@rewards.register("length")
def length(completions: list[str], records: list[Record]) -> list[float | None]:
    """Differs within nearly every group, whatever an untrained model says."""
    return [float(len(text)) for text in completions]


def phases(metrics: dict[str, float]) -> dict[str, float]:
    """Seconds of each phase without the phases inside it, and "other"."""
    seconds = {phase: metrics.get(f"time/{phase}", 0.0) for phase in (*PHASES, "rollout")}
    for outer, inner in INSIDE.items():
        seconds[outer] -= sum(seconds[phase] for phase in inner)
    del seconds["rollout"]
    return seconds | {"other": metrics["time/step"] - sum(seconds.values())}


def measure(records: Sequence[Record], changes: dict[str, Any], steps: int) -> dict[str, float]:
    """Median seconds of each phase and of the step, after one step that warms up."""
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {"output": folder, "rewards": {"length": 1.0}, "sample_every": 0, "tensorboard": False}
        model, processor = build_tiny(0)
        trainer = Trainer(model, processor, records, config=APPOConfig.from_dict(settings | changes))
        found = []
        for number in range(2, steps + 3):
            metrics = trainer.step(number)
            found.append(phases(metrics) | {"step": metrics["time/step"]})
    return {name: statistics.median(values[name] for values in found[1:]) for name in found[0]}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar per variant, its phases side by side."""
    pyplot = plots.pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.7 * len(rows)))
    left = [0.0] * len(rows)
    for phase in (*PHASES, "other"):
        widths = [row[phase] for row in rows]
        axes.barh([row["variant"] for row in rows], widths, left=left, label=phase, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step (medians)")
    axes.legend(ncol=len(PHASES) + 1, loc="lower center", bbox_to_anchor=(0.45, 1.0), frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each variant")
    parser.add_argument("--threads", type=int, default=1, help="more are slower: the model is tiny")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        records = load_records(make_task(folder, sizes={"train": 64})["train"])
        for variant, changes in VARIANTS.items():
            row = {"variant": variant, **measure(records, {"preset": "paper"} | changes, options.steps)}
            print(
                f"{variant:26s}", "  ".join(f"{name} {row[name]:.3f}" for name in row if name != "variant"), flush=True
            )
            rows.append(row)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = harness.save(f"training-step-{device}", rows, device=device)
    draw(rows, path.with_suffix(".png"))
    print(f"written: {path}, .csv, .png")


if __name__ == "__main__":
    main()
