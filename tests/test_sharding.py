"""`shard: fsdp`: two processes train as one does, save what it saves, and go on as one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_run import train, train_together

from appo.config import APPOConfig, ConfigError
from appo.train.sharding import check_launch

TINY: dict[str, Any] = {
    "prompts_per_step": 4, "max_new_tokens": 8, "group_size": 3, "max_steps": 2, "save_every": 2,
    "learning_rate": 1e-4,  # what Adam makes of rounding grows with it
}  # fmt: skip


def final(output: Path) -> dict[str, torch.Tensor]:
    (file,) = (output / "final").glob("*model.safetensors")
    return load_file(file)


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative L2 over all weights."""
    assert found.keys() == wanted.keys()
    error = sum(float((found[name] - value).double().square().sum()) for name, value in wanted.items())
    return (error / sum(float(value.double().square().sum()) for value in wanted.values())) ** 0.5


def assert_same_run(found: Path, wanted: Path) -> None:
    """Saved weights and every number of every step to 2e-6, but for times and memory; equal answers."""
    assert distance(final(found), final(wanted)) < 1e-6
    for ours, theirs in zip(metrics(found), metrics(wanted), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6, abs=1e-6)
    assert (found / "eval.jsonl").read_text() == (wanted / "eval.jsonl").read_text()


def metrics(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))} for line in lines
    ]


def test_two_processes_train_and_save_as_one(tmp_path):
    # The first process has text alone and no signal, the second has two groups to score and to learn from.
    runs = [TINY | {"output": str(tmp_path / shard), "shard": shard, "heads_every": 1} for shard in ("fsdp", "none")]
    found = train_together(2, *runs)
    assert all(first["idle"] > 0 and second["idle"] == 0 for first, second in zip(*found, strict=True))
    assert found[0][0]["saved"] == found[0][0]["equal"] > 0
    train(str(tmp_path / "one"), **TINY)
    for shard in ("fsdp", "none"):
        assert_same_run(tmp_path / shard, tmp_path / "one")


# What else changes which weights are sharded, trained or saved; and what makes other forwards (a reference policy).
CASES: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 4},
    "lora with a reference": {"lora_rank": 4, "beta": 0.1},
    "tied": {"tied": True},
    "frozen tower, checkpointing": {"freeze_vision": True, "gradient_checkpointing": True},
    "reference": {"beta": 0.1},
    "text-only groups learn": {"rewards": {"length_parity": 1.0}},
}


@pytest.mark.slow
def test_every_kind_of_training_is_that_of_one_process(tmp_path):
    runs = [
        TINY | settings | {"output": str(tmp_path / f"two {name}"), "shard": "fsdp"} for name, settings in CASES.items()
    ]
    train_together(2, *runs)
    for name, settings in CASES.items():
        train(str(tmp_path / name), **(TINY | settings))
        assert distance(final(tmp_path / f"two {name}"), final(tmp_path / name)) < 1e-6, name
        assert all(step["grad_norm"] > 0 for step in metrics(tmp_path / f"two {name}")), name


# Settings with which groups are drawn or shared out by process, so that one process does something else.
BY_PROCESS: dict[str, dict[str, Any]] = {
    "updates": {"updates_per_step": 2, "rewards": {"length_parity": 1.0}},
    "dynamic sampling": {"method": "grpo", "dynamic_sampling": True, "max_sampling_rounds": 2},
}


@pytest.mark.slow
def test_shards_are_trained_as_copies_are(tmp_path):
    runs = [
        TINY | settings | {"output": str(tmp_path / f"{shard} {name}"), "shard": shard, "freeze_vision": True}
        for name, settings in BY_PROCESS.items()
        for shard in ("fsdp", "none")
    ]
    train_together(2, *runs)
    for name in BY_PROCESS:
        assert distance(final(tmp_path / f"fsdp {name}"), final(tmp_path / f"none {name}")) < 1e-6, name


@pytest.mark.slow
def test_another_engine_gets_whole_weights_from_shards(tmp_path):
    train_together(2, TINY | {"output": str(tmp_path / "two"), "shard": "fsdp", "engine": "vllm"})
    train(str(tmp_path / "one"), **TINY)
    assert distance(final(tmp_path / "two"), final(tmp_path / "one")) < 1e-6


@pytest.mark.slow
def test_bfloat16_keeps_weights_in_fp32_and_trains(tmp_path):
    train_together(2, TINY | {"output": str(tmp_path), "shard": "fsdp", "dtype": "bfloat16"})
    assert {value.dtype for value in final(tmp_path).values()} == {torch.float32}
    assert all(0 < step["grad_norm"] < float("inf") for step in metrics(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])  # all weights, or adapters alone
def test_a_checkpoint_of_two_is_continued_by_one(tmp_path, lora_rank):
    both, alone = tmp_path / "both", tmp_path / "alone"
    settings = TINY | {"lora_rank": lora_rank}
    train_together(2, settings | {"output": str(both), "shard": "fsdp"})
    train(str(both), **(settings | {"max_steps": 3}))
    train(str(alone), **(settings | {"max_steps": 3}))
    assert [line["step"] for line in metrics(both)] == [1, 2, 3]
    assert distance(final(both), final(alone)) < 1e-6


@pytest.mark.parametrize(
    "name, asked",
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP plugin"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism config"),
    ],
)
def test_other_sharding_of_an_accelerate_config_is_refused_by_name(monkeypatch, name, asked):
    check_launch()
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=asked):
        check_launch()


def test_fp16_is_refused_with_shards():
    with pytest.raises(ConfigError, match=r"dtype.*float16"):
        APPOConfig(shard="fsdp", dtype="float16")
