"""`appo plan` of sharded models: against what two processes really take, and what its settings bring; the recipes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sharded_plan
from sharded_run import run_together

from appo.config import APPOConfig, ConfigError
from appo.models.architectures import ARCHITECTURES
from appo.planning.plan import GIB, Plan, planned
from appo.planning.workload import Workload

WITHIN = 0.10
EXAMPLES = Path(__file__).parent.parent / "examples"


# All weights and adapters; with and without activations computed again, of every fourth of six layers too; a forward in
# bf16, whose gradients are reduced in fp32.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora_rank", "every", "dtype"),
    [(0, 0, "float32"), (0, 1, "float32"), (0, 4, "float32"), (8, 0, "float32"), (0, 0, "bfloat16"),
     (0, 1, "bfloat16")],
)  # fmt: skip
def test_peak_memory_of_shards(lora_rank: int, every: int, dtype: str) -> None:
    settings: dict[str, Any] = {"lora_rank": lora_rank, "gradient_checkpointing": every > 0, "dtype": dtype}
    settings["checkpoint_every"] = max(1, every)
    plan = sharded_plan.plan(**settings)
    measured, _ = run_together(2, sharded_plan.__file__, json.dumps(settings))
    standing, update = plan.standing(), plan.update_bytes() | {"gradients": 0.0}
    expected = {
        "weights": standing["weights"],
        "optimizer": standing["optimizer"],
        "update": sum(update.values()),
        "rollout": plan.rollout_bytes()["whole model"],
    }
    print(
        settings, {name: (round(size / 2**20, 1), round(measured[name] / 2**20, 1)) for name, size in expected.items()}
    )
    assert measured == pytest.approx(expected, rel=WITHIN)


def test_what_settings_of_shards_bring() -> None:
    base = Plan(ARCHITECTURES["Qwen2.5-VL-7B"], Workload(gpus=16, checkpointing=True))

    def of(**changes: Any) -> Plan:
        return replace(base, work=replace(base.work, **changes))

    def standing(plan: Plan) -> float:
        return sum(plan.standing().values())

    assert standing(of(shard_group=8)) == pytest.approx(2 * standing(base))
    assert standing(of(offload=True)) == 0 and of(offload=True).host_bytes() == pytest.approx(
        16 * base.trained / 16 + 4 * (base.model.parameters - base.trained) / 16
    )
    assert standing(of(reference=True)) - standing(base) == pytest.approx(4 * base.model.parameters / 16)
    assert of(shard_group=1, optimizer="adamw_8bit").standing()["optimizer"] == 2 * base.trained
    # The model that samples is whole in each; another engine's is elsewhere.
    whole = base.memory()["rollout"]["whole model"]
    assert whole == 2 * base.model.parameters and of(own_rollout=False).memory()["rollout"] == base.standing() | {
        "weights in bf16": 0.0
    }
    assert of(rollout_tokens=4096).rollout_bytes()["cache"] < base.rollout_bytes()["cache"]
    with pytest.raises(ConfigError, match="`shard_group`: expected a divisor of the 16 GPUs"):
        of(shard_group=3)


# GPUs that each recipe is meant for, and the GiB of each.
RECIPES = {
    "qwen2_5_vl_3b_24gb.yaml": (1, 24),
    "qwen2_5_vl_3b.yaml": (1, 80),
    "qwen2_5_vl_7b.yaml": (1, 80),
    "qwen2_5_vl_7b_8gpu.yaml": (8, 80),
    "qwen2_5_vl_72b_8nodes.yaml": (64, 80),
}
MARGIN = 0.9  # of the GPU's memory, for what libraries and fragments take


# Every recipe of the documentation with every preset of the paper, of which two sample again.
@pytest.mark.parametrize("method", ["paper", "released", "grpo", "dapo"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_with_every_method(name: str, method: str) -> None:
    gpus, memory = RECIPES[name]
    config = APPOConfig.load(EXAMPLES / name, [f"preset={method}"])
    plan = planned(config, gpus)
    assert plan.peak() <= MARGIN * memory * GIB, plan.text(memory=memory * GIB, rate=4e14, bandwidth=2.5e12)
    assert config.prompts_per_step % gpus == 0
    assert (config.method == "grpo") == (method in ("grpo", "dapo")) and config.dynamic_sampling == (method == "dapo")


def test_every_recipe_is_checked() -> None:
    recipes = {path.name for path in EXAMPLES.glob("qwen*.yaml")}
    assert recipes == RECIPES.keys()


def test_a_plan_of_settings_is_that_of_the_command() -> None:
    from typer.testing import CliRunner

    from appo.cli import app

    path = str(EXAMPLES / "qwen2_5_vl_7b_8gpu.yaml")
    found = CliRunner().invoke(app, ["plan", "--config", path, "--gpus", "8"])
    assert found.exit_code == 0, found.output
    assert found.output.strip() == planned(APPOConfig.load(path), 8).text(memory=80 * GIB, rate=4e14, bandwidth=2.5e12)
    refused = CliRunner().invoke(app, ["plan", "--config", path, "--gpus", "7"])
    assert refused.exit_code != 0
