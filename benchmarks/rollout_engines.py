"""Does training with vLLM's rollouts go as with the model's own? `python -m benchmarks.rollout_engines --vllm-python P`

The demo's tiny Qwen2.5-VL, from one warm start per seed, with rollouts by transformers, by a vLLM server, and by a vLLM
server one step ahead. Prints reward, time and differences of log-probabilities as a table in Markdown; what a run
left behind is read again, so that an interrupted benchmark goes on.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from appo import demo
from appo.data.load import load_records
from appo.train.setup import load_model
from appo.train.trainer import Trainer

ENGINES: dict[str, dict[str, Any]] = {
    "transformers": {"engine": "transformers"},
    "vllm-server": {"engine": "vllm-server"},
    "vllm-server, asynchronous": {"engine": "vllm-server", "asynchronous": True},
}
FIRST = LAST = 5  # steps over which reward is averaged


def run(work: Path, name: str, seed: int, steps: int, python: str) -> list[dict[str, float]]:
    """The metrics of each step of one run, made unless they are there."""
    clips = demo.stage("clips", work / f"clips-{seed}", lambda folder: demo.make_clips(folder, seed))
    warm = demo.stage("warm start", work / f"warm-{seed}", lambda folder: demo.warm_start(folder, clips, seed))
    output = work / f"{name.replace(', ', '-')}-{seed}"
    settings = demo.SETTINGS | demo.METHODS["appo"] | ENGINES[name]
    if settings["engine"] != "transformers":
        settings = settings | demo.engine_settings(settings["engine"], python)
    settings |= {"seed": seed, "max_steps": steps, "output": str(output), "model": str(warm), "tensorboard": False}
    config = demo.APPOConfig.from_dict(settings | {"data": str(clips / "train.json"), "eval_every": 0})
    if not (output / "final").is_dir():
        model, processor = load_model(config)
        trainer = Trainer(model, processor, load_records(config.data), config=config)
        try:
            trainer.train()
        finally:
            trainer.close()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def row(name: str, seed: int, steps: list[dict[str, float]]) -> str:
    """One line of the table."""

    def mean(key: str, part: list[dict[str, float]]) -> str:
        values = [step[key] for step in part if key in step]
        return f"{statistics.fmean(values):.3g}" if values else "-"

    largest = max((step.get("engine/logprob_diff_max", 0.0) for step in steps), default=0.0)
    cells = [
        name, str(seed), mean("reward", steps[:FIRST]), mean("reward", steps[-LAST:]),
        mean("engine/logprob_diff", steps), f"{largest:.2g}", mean("engine/effective_sample_size", steps),
        f"{statistics.median(step['time/step'] for step in steps[1:]):.1f}",
        f"{statistics.median(step['time/rollout'] for step in steps[1:]):.1f}",
        mean("time/wait", steps[1:]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--work", type=Path, default=Path("rollout-engines"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"| engine | seed | reward, steps 1 to {FIRST} | last {LAST} | difference of log-probabilities | largest | "
        "effective sample size | s a step | of it sampling | waiting for responses |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed in options.seeds:
        for name in options.engines:
            lines.append(row(name, seed, run(options.work, name, seed, options.steps, options.vllm_python)))
            print(lines[-1], flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
