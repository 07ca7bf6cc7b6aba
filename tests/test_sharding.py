"""`shard: fsdp`: two processes train as one does, save what it saves, and go on as one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from safetensors.torch import load_file
from sharded_run import train, train_together

from appo.config import APPOConfig, ConfigError
from appo.train.launch import check_launch

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
    """Saved weights and every number of every step to 1e-6, but for times and memory; equal answers."""
    assert distance(final(found), final(wanted)) < 1e-6
    for ours, theirs in zip(metrics(found), metrics(wanted), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
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
    "dora": {"lora_rank": 4, "dora": True},
    "lora with a reference": {"lora_rank": 4, "beta": 0.1},
    "tied": {"tied": True},
    "frozen tower, checkpointing": {"freeze_vision": True, "gradient_checkpointing": True},
    "every second layer again, on the host": {
        "gradient_checkpointing": True,
        "checkpoint_every": 2,
        "checkpoint_offload": True,
    },
    "reference": {"beta": 0.1},
    "text-only groups learn": {"rewards": {"length_parity": 1.0}},
    "offload": {"offload": True},
    "offload with a reference": {"offload": True, "beta": 0.1, "updates_per_step": 2},
    "shards of one, copied": {"shard_group": 1},
}


@pytest.mark.slow
def test_every_kind_of_training_is_that_of_one_process(tmp_path):
    runs = [
        TINY | settings | {"output": str(tmp_path / f"two {name}"), "shard": "fsdp"} for name, settings in CASES.items()
    ]
    train_together(2, *runs)
    for name, settings in CASES.items():
        alone = {key: value for key, value in settings.items() if key not in ("offload", "shard_group")}
        train(str(tmp_path / name), **(TINY | alone))
        assert distance(final(tmp_path / f"two {name}"), final(tmp_path / name)) < 1e-6, name
        assert all(step["grad_norm"] > 0 for step in metrics(tmp_path / f"two {name}")), name


@pytest.mark.slow
def test_shards_within_nodes_and_copies_between_them(tmp_path):
    settings = TINY | {"prompts_per_step": 8, "max_steps": 1}
    runs = [
        settings | {"output": str(tmp_path / f"{group}"), "shard": "fsdp", "shard_group": group} for group in (0, 2, 4)
    ]
    train_together(4, *runs, settings | {"max_steps": 2, "output": str(tmp_path / "2")})  # goes on as copies
    train(str(tmp_path / "one"), **settings)
    for name in ("0", "4"):
        assert_same_run(tmp_path / name, tmp_path / "one")
    train(str(tmp_path / "one"), **(settings | {"max_steps": 2}))
    assert_same_run(tmp_path / "2", tmp_path / "one")


# Families whose vision towers are built differently.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_one_process_reads_the_weights(tmp_path, family):
    for part in training.tiny(family=family):
        part.save_pretrained(tmp_path / "model")
    runs: list[dict[str, Any]] = [{"beta": 0.1}, {"lora_rank": 4}, {"tied": True}]
    runs = [TINY | run | {"model": str(tmp_path / "model")} for run in runs]
    for part in training.tiny(family=family, tie_word_embeddings=True):
        part.save_pretrained(tmp_path / "tied")
    runs[2]["model"] = str(tmp_path / "tied")
    adapters = str(tmp_path / "two 1" / "final")
    runs += [TINY | {"model": adapters, "lora_rank": 4}, TINY | {"model": adapters}]  # going on with them; merged
    found = train_together(
        2, *(r | {"output": str(tmp_path / f"two {i}"), "shard": "fsdp"} for i, r in enumerate(runs))
    )
    assert not any(run["meta"] for run in found[0]) and all(run["meta"] for run in found[1])
    for i, run in enumerate(runs):
        train(str(tmp_path / f"one {i}"), **run)
        assert_same_run(tmp_path / f"two {i}", tmp_path / f"one {i}")


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
def test_a_sharded_run_goes_on_in_other_numbers_of_processes(tmp_path):
    settings = TINY | {"prompts_per_step": 6, "save_every": 1, "output": str(tmp_path / "parts"), "shard": "fsdp"}
    for steps, world in ((1, 2), (2, 3)):
        train_together(world, settings | {"max_steps": steps})
    train(settings.pop("output"), **(settings | {"max_steps": 3}))
    train(str(tmp_path / "whole"), **(settings | {"max_steps": 3}))
    assert distance(final(tmp_path / "parts"), final(tmp_path / "whole")) < 1e-6
    for ours, theirs in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


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


# Every other kind of sharding that accelerate can be told to do.
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
    config = APPOConfig(shard="fsdp")
    check_launch(config)
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=asked):
        check_launch(config)


def test_launches_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="`offload`: expected a launch with torchrun"):
        check_launch(APPOConfig(shard="fsdp", offload=True))
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match="`shard_group`: expected a divisor of the 6 processes, got 4"):
        check_launch(APPOConfig(shard="fsdp", shard_group=4))
    for changes in ({"offload": True}, {"shard_group": 8}):
        with pytest.raises(ConfigError, match="needs shards, got shard = none"):
            APPOConfig(**changes)


def test_fp16_is_refused_with_shards():
    with pytest.raises(ConfigError, match=r"dtype.*float16"):
        APPOConfig(shard="fsdp", dtype="float16")
