"""README.md beside a saved model: where it comes from, how it was trained, what it scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appo.config import APPOConfig
from appo.yaml_files import dump_yaml

METHODS = {
    "appo": "APPO (attention-guided perception policy optimisation, arXiv 2602.23823)",
    "grpo": "GRPO",
    "tw-grpo": "GRPO with the token weights of TW-GRPO (arXiv 2505.24718)",
    "vppo": "GRPO with a token filter as VPPO's (arXiv 2510.09285), by frame mass",
    "pgpo": "GRPO with token weights as PGPO's (arXiv 2604.01840), by frame mass",
}
# Settings of the machine and of its folders, which say nothing of the model.
LOCAL = (
    "data_root",
    "output",
    "frame_cache",
    "engine_urls",
    "vllm_python",
    "vllm_arguments",
    "project",
)


def model_card(config: APPOConfig, step: int, evaluations: Mapping[str, Mapping[str, float]]) -> str:
    """A card in the form of the Hugging Face hub. evaluations: split -> the newest numbers of it."""
    base = config.model
    named = base if base and not Path(base).exists() else Path(base).name or "a model of transformers"
    method = METHODS.get(config.method, f"GRPO with the token weights of {Path(config.method).name}")
    if config.method == "grpo" and config.dynamic_sampling:
        method = "DAPO"
    if config.attention_coef > 0:
        method += " and a policy gradient on attention (RAL, arXiv 2602.04884)"
    head: dict[str, Any] = {
        "library_name": "peft" if config.lora_rank else "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["appo", "reinforcement-learning", "video"],
    }
    if base and not Path(base).exists():
        head = {"base_model": base} | head
    settings = {name: value for name, value in config.public().items() if name not in LOCAL}
    settings |= {name: Path(settings[name] or "").name for name in ("model", "data", "eval_data")}
    return "\n".join(
        [
            f"---\n{dump_yaml(head)}---\n",
            f"# {named}, trained with {method}\n",
            f"{step} steps of {config.prompts_per_step} questions about videos with {config.group_size} responses each"
            + (f", as LoRA adapters of rank {config.lora_rank}" if config.lora_rank else "")
            + ". Frames were sampled as below; it has seen no other rate or size of them.\n",
            *_table(evaluations),
            f"## Settings\n\n```yaml\n{dump_yaml(settings)}```\n",
        ]
    )


def _table(evaluations: Mapping[str, Mapping[str, float]]) -> list[str]:
    shown = ("accuracy", "format", "temporal_iou", "length", "records")
    names = [name for name in shown if any(name in values for values in evaluations.values())]
    if not names:
        return []
    lines = [["held-out records", *names], ["---"] * (len(names) + 1)]
    for split, values in evaluations.items():
        lines.append([split, *(f"{values[name]:.4g}" if name in values else "" for name in names)])
    return ["## Evaluation\n", *("| " + " | ".join(line) + " |" for line in lines), ""]


def newest_evaluations(path: Path) -> dict[str, dict[str, float]]:
    """Split -> its last line of an eval.jsonl; empty where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines]
    return {line.pop("split"): line for line in found}
