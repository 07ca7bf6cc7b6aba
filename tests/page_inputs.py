"""Run folders and scored groups as training leaves them, made up, for the tests of pages."""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch

QUESTION = "Which colour is the flash?"
OPTIONS = ["A. red", "B. green", "C. blue", "D. yellow"]


def write_run(folder: Path, *, method: str = "appo", steps: int = 40, max_steps: int = 40, seed: int = 0) -> Path:
    """A run that learns: every metric that training logs, evaluations every 20 steps, samples every 10."""
    chance = random.Random(seed)
    weighted = method == "appo"
    folder.mkdir(parents=True)
    settings = {
        "method": "appo" if weighted else "grpo",
        "dynamic_sampling": str(method == "dapo").lower(),
        "max_steps": max_steps,
        "group_size": 8,
        "prompts_per_step": 16,
        "strategy": "hard",
        "alpha": 1.7,
        "top_frames": 3,
        "data": "demo/data/train.json",
        "rewards": "{accuracy: 0.9, format: 0.1}",
    }
    (folder / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    lines = [_metrics(step, chance, weighted) for step in range(1, steps + 1)]
    _write(folder / "metrics.jsonl", lines)
    evaluations = []
    for step in range(0, steps + 1, 20):
        value = 0.41 + 0.45 * (1 - math.exp(-step / 15))
        kinds = {
            f"accuracy/{kind}": min(1.0, value + d) for kind, d in (("colour", 0.08), ("order", -0.12), ("count", 0))
        }
        evaluations.append({"step": step, "split": "eval", "accuracy": value, "format": 0.99, "records": 128.0} | kinds)
        evaluations.append({"step": step, "split": "ood", "accuracy": value - 0.1, "format": 0.97, "records": 64.0})
    _write(folder / "eval.jsonl", evaluations)
    _write(folder / "samples.jsonl", [_sample(step, chance, weighted) for step in (1, *range(10, steps + 1, 10))])
    return folder


def write_small_run(folder: Path, **options: Any) -> Path:
    """A run whose only metric is the reward: quick to draw."""
    run = write_run(folder, **options)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    _write(run / "metrics.jsonl", [{"step": line["step"], "reward": line["reward"]} for line in lines])
    return run


def _metrics(step: int, chance: random.Random, weighted: bool) -> dict[str, Any]:
    rise = 1 - math.exp(-step / 12)
    near = lambda value, spread: max(0.0, value + chance.gauss(0, spread))  # noqa: E731
    metrics = {
        "step": step,
        "loss": near(0.02, 0.01),
        "reward": near(0.42 + 0.4 * rise, 0.04),
        "reward/accuracy": near(0.41 + 0.4 * rise, 0.04),
        "reward/format": min(1.0, near(0.97, 0.01)),
        "accuracy": near(0.41 + 0.4 * rise, 0.04),
        "length/mean": near(19, 0.3),
        "length/max": 22.0,
        "entropy": near(0.62 - 0.3 * rise + 0.05 * weighted, 0.01),
        "grad_norm": near(0.8 + 0.3 * weighted, 0.12),
        "clip/low": near(0.004, 0.001),
        "clip/high": near(0.006, 0.001),
        "kl/approx": near(0.004, 0.001),
        "groups/no_signal": near(0.1 + 0.3 * rise, 0.04),
        "time/rollout": near(0.3, 0.02),
        "time/score": near(0.22, 0.02),
        "time/update": near(0.42, 0.02),
        "time/step": near(0.95, 0.03),
        "memory/peak_gib": 1.1 + 0.2 * rise,
        "lr": 5e-4,
    }
    if weighted:
        metrics |= {
            "clip/weighted": near(0.015, 0.003),
            "clip/unweighted": near(0.008, 0.001),
            "weight/mean": near(1.14, 0.02),
            "weight/max": near(2.4, 0.1),
            "weight/share": near(0.35, 0.03),
            "frames/target": near(1.4, 0.2),
            "frames/empty": min(1.0, near(0.35, 0.05)),
            "frames/precision": min(1.0, near(0.3 + 0.3 * rise, 0.05)),
            "frames/precision_chance": 0.25,
            "frames/recall_chance": near(0.17, 0.02),
            "frames/recall": min(1.0, near(0.35 + 0.35 * rise, 0.05)),
            "mass/frames": near(0.45, 0.02),
        }
    return metrics


def _sample(step: int, chance: random.Random, weighted: bool) -> dict[str, Any]:
    completions = []
    for _ in range(8):
        colour, letter = chance.choice([("red", "A"), ("green", "B"), ("green", "B"), ("blue", "C")])
        tokens = f"<think> the shape is grey and for a moment it turns {colour} </think> <answer> {letter} </answer>"
        words = tokens.split()
        weights = [1 + 1.1 * chance.random() * (word in ("moment", "turns", colour, letter)) for word in words]
        completions.append(
            {
                "text": tokens,
                "reward": 1.0 if letter == "B" else 0.1,
                "accuracy": float(letter == "B"),
                "tokens": words,
                "weights": weights if weighted else None,
                "frames": [4, 5] if weighted else None,
            }
        )
    return {
        "step": step,
        "id": f"clip-{step}",
        "question": QUESTION,
        "options": OPTIONS,
        "answer": "B",
        "labelled_frames": [5],
        "completions": completions,
    }


def inspection(G: int = 4, F: int = 8, N: int = 24) -> dict[str, Any]:
    """Arguments of write_inspection: a grey square, green in two frames that some answers look at."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.full((2 * F, 3, 28, 28), 60, dtype=torch.uint8)
    frames[:, :, 9:19, 9:19] = 150
    frames[F : F + 4, :, 9:19, 9:19] = torch.tensor([50, 185, 80], dtype=torch.uint8)[:, None, None]
    frames = (frames + torch.randint(0, 20, frames.shape, generator=generator)).to(torch.uint8)
    tokens = []
    for i in range(G):
        colour, letter = (("green", "B"), ("blue", "C"), ("green", "B"), ("red", "A"))[i % 4]
        text = f"<think> the shape is grey and for a moment it turns {colour} </think> <answer> {letter} </answer>"
        tokens.append(text.split())
    mass = torch.rand(G, N, F, generator=generator) * 0.03
    weights = torch.ones(G, N)
    for i, row in enumerate(tokens):
        for t, word in enumerate(row):
            if word in ("moment", "turns", "green", "blue", "red", "A", "B", "C"):
                mass[i, t, (F // 2, F // 2 + 1) if i % 2 == 0 else (0, 1)] += 0.2 + 0.2 * torch.rand(
                    1, generator=generator
                )
                weights[i, t] = 1 + 1.2 * float(torch.rand(1, generator=generator))
    return {
        "frames": frames,
        "times": [(f * 0.5, f * 0.5 + 0.25) for f in range(F)],
        "tokens": tokens,
        "mass": mass,
        "selected": torch.tensor([F // 2, F - 2]),
        "weights": weights,
        "rewards": torch.tensor([1.0, 0.1, 1.0, 0.1])[torch.arange(G) % 4],
        "question": QUESTION,
        "options": OPTIONS,
        "answer": "B",
        "labelled": [F // 2, F // 2 + 1],
    }


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# What would run, or break out of an attribute, an element, a script or a style, where a page does not escape it.
RUN = "document.documentElement.dataset.attacked = 1"
# Text that would run or change the page as markup, in an attribute, in a script, in a link or in CSS.
ATTACKS = (
    f"\"'><script>{RUN}</script><img src=x onerror='{RUN}'>",
    f"</script></title></style></p><svg onload='{RUN}'>",
    f"red;background:url(javascript:{RUN})' onmouseover='{RUN}' autofocus onfocus='{RUN}' x='",
    f"javascript:{RUN}",
    "<!--<script>",
    "$\\frac{1}{",
    "&lt;script&gt; \u202e \ud83c\udfc3 \u2028",
)


def write_hostile_run(folder: Path, attack: str) -> Path:
    """A run folder whose every text, name of a metric and setting is ``attack``, and whose numbers are often none."""
    write_small_run(folder, steps=6, max_steps=6)
    settings = {"max_steps": attack, "data": attack, "group_size": attack, "strategy": attack, "alpha": attack}
    settings |= {"prompts_per_step": attack, "top_frames": attack, "eval_samples": attack, "method": attack}
    settings |= {"rewards": {attack: 1.0, "accuracy": attack, "format": 2}, attack: [attack]}
    (folder / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    odd = [math.nan, math.inf, -math.inf, 1e308, attack, None, [attack], {attack: attack}, True, -1]
    lines = [{"step": i, "split": attack, "accuracy": 0.5, "records": v, f"accuracy/{attack}": 0.1, "accuracy/x": v}
             for i, v in enumerate(odd)]  # fmt: skip
    _write(folder / "eval.jsonl", [*lines, {"step": 99, "split": attack, "accuracy": 7, f"accuracy/{attack}": 99}])
    metrics = [{"step": i, "reward": v, "entropy": v, "time/rollout": v, attack: v} for i, v in enumerate(odd)]
    _write(folder / "metrics.jsonl", [*metrics, {"step": 99, "reward": 1.0, "weight/share": 1e300}])
    completions: list[Any] = [
        {"text": attack, "tokens": [attack, v, "a"], "weights": [v, 1.5, 2.0], "accuracy": v, "reward": v,
         "frames": [attack, v, 3]} for v in odd
    ]  # fmt: skip
    completions += [attack, None, [attack], {}, {"tokens": attack, "weights": attack, "frames": attack}]
    completions += [{"tokens": ["a", "b"], "weights": [1.0]}, {"text": attack, "weights": [2.0]}]
    sample = {"question": attack, "options": [attack, 3, None], "answer": attack, "labelled_frames": [attack, 3]}
    bare = [{"step": 1}, {"step": 2, "completions": attack, "options": attack, "labelled_frames": attack}]
    _write(folder / "samples.jsonl", [*bare, {"step": 3, "completions": completions} | sample])
    return folder


def hostile_inspection(attack: str) -> dict[str, Any]:
    """Arguments of write_inspection with ``attack`` in every text, and numbers that are none."""
    made = inspection()
    made["mass"][0, 2, 3], made["mass"][1], made["mass"][2, 0, 0] = math.nan, math.nan, math.inf
    made["weights"][0, 1], made["weights"][1, 2], made["weights"][2] = math.nan, math.inf, -math.inf
    made["tokens"][0][0] = made["tokens"][1][3] = made["question"] = made["answer"] = attack
    return made | {"options": [attack, f"A. {attack}"], "rewards": [math.nan, math.inf, 1.0, 0.0]}
