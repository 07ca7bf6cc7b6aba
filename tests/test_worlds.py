"""Any number of processes, copies or shards, trains, measures, answers and saves as one does."""

import json
from pathlib import Path
from typing import Any

import pytest
import training
from sharded_run import train_together
from test_sharding import assert_same_run
from transformers import AutoModelForImageTextToText, AutoProcessor

from appo.train.evaluate import evaluate

# Of the six prompts of the first step three have no video and no signal: none, one or both of a process of three, two
# or one of a process of two; and those of one process of three are all such. More processes than questions answer them.
UNEVEN: dict[str, Any] = {
    "prompts_per_step": 6, "group_size": 3, "max_new_tokens": 8, "max_steps": 2, "without": (0, 2, 3),
    "learning_rate": 3e-5, "eval_every": 1, "save_every": 0,
}  # fmt: skip
# What changes which weights are trained and which forwards are made; several updates on unequally many groups.
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_rank": 4},
    "reference": {"beta": 0.1, "updates_per_step": 2},
    "lora, reference": {"lora_rank": 4, "beta": 0.1, "updates_per_step": 3},
    "without signal": {"rewards": {"constant": 1.0}},
    "by response": {"aggregation": "grpo", "freeze_vision": True, "gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_number_of_processes_trains_as_one(tmp_path: Path) -> None:
    def runs(world: int) -> list[dict[str, Any]]:
        shards = ("none", "fsdp") if world > 1 else ("none",)
        return [
            UNEVEN | settings | {"output": str(tmp_path / f"{kind}, {world} {shard}"), "shard": shard}
            for kind, settings in KINDS.items()
            for shard in shards
        ]

    for world in (1, 2, 3):
        train_together(world, *runs(world))
    for kind in KINDS:
        for world in (2, 3):
            for shard in ("none", "fsdp"):
                assert_same_run(tmp_path / f"{kind}, {world} {shard}", tmp_path / f"{kind}, 1 none")


@pytest.mark.slow
def test_what_is_saved_is_loaded_by_transformers_and_answers_alike(tmp_path: Path) -> None:
    train_together(2, UNEVEN | {"output": str(tmp_path), "shard": "fsdp", "without": ()})
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "final", dtype="float32")
    processor = AutoProcessor.from_pretrained(tmp_path / "final")
    values = evaluate(
        model, processor, training.records()[:3], training.config(tmp_path, max_new_tokens=UNEVEN["max_new_tokens"])
    )
    assert values == {name: value for name, value in last_evaluation(tmp_path).items() if name not in ("step", "split")}


def last_evaluation(output: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((output / "eval.jsonl").read_text().splitlines()[-1])
    return found
