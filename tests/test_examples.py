"""The examples run as they are written, and the README shows what is in them."""

import re
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

from appo import frame_ids, record_frame_mass
from appo.config import APPOConfig
from appo_kernels import linear_weighted_surrogate

ROOT = Path(__file__).parent.parent


def test_own_trainer_runs_as_written():
    done = subprocess.run(
        [sys.executable, ROOT / "examples/own_trainer.py"], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"frames \[\d.*\], loss -?\d\.\d+, mean weight 1\.\d+", done.stdout), done.stdout


def test_readme_shows_the_example_as_it_is():
    assert snippet("# 1. Score") in (ROOT / "examples/own_trainer.py").read_text()


def snippet(first_words: str) -> str:
    """The Python of README.md that has these words in its first line."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if first_words in block.split("\n")[0]]
    return found.strip()


def test_readmes_first_pair_gives_the_same_mass():
    made = models.qwen2_5_vl()
    made.model.set_attn_implementation("eager")
    inputs = made.inputs([models.random_video(3, 28, 28)], ["What falls?"], response="a cup")
    frames = frame_ids(inputs["input_ids"], made.config, video_grid_thw=inputs["video_grid_thw"])
    count = int(frames.num_frames[0])
    names = {
        "model": made.model, "inputs": inputs, "torch": torch, "record_frame_mass": record_frame_mass,
        "frame_ids": frame_ids, "ids": inputs["input_ids"], "grids": {"video_grid_thw": inputs["video_grid_thw"]},
        "rows": slice(-5, None), "one_hot_of_frames": (frames.ids[..., None] == torch.arange(count)).float(),
    }  # fmt: skip
    before, after = snippet("output_attentions=True").split("\n\n")
    with torch.no_grad():
        exec(before, names)
        expected, logits = names["mass"], names["out"].logits
        exec(after, names)
    assert torch.equal(names["out"].logits, logits)
    torch.testing.assert_close(names["mass"], expected, rtol=1e-4, atol=1e-6)


def test_readmes_second_pair_gives_the_same_loss():
    B, T, D, V = 4, 7, 8, 19
    mask = torch.arange(T) < torch.tensor([[7], [1], [5], [7]])
    names = {
        "torch": torch, "hidden": torch.randn(B, T, D), "weight": torch.randn(V, D), "mask": mask, "A": torch.randn(B),
        "targets": torch.randint(V, (B, T)), "old_logprobs": -3 + 0.2 * torch.randn(B, T), "W": torch.ones(B, T),
        "linear_weighted_surrogate": linear_weighted_surrogate,
    }  # fmt: skip
    before, after = snippet("before: two tensors").split("\n\n")
    exec(before, names)
    expected = names["loss"]
    exec(after, names)
    torch.testing.assert_close(names["loss"], expected, rtol=1e-5, atol=1e-6)


# All that are there, so that a new one is tested too.
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("qwen*.yaml")), ids=lambda path: path.stem)
def test_configurations_load(path):
    config = APPOConfig.load(path)
    assert config.group_size == 8 and config.model.startswith("Qwen/")


def test_the_recipe_for_a_node_shards_all_weights_over_eight_processes():
    config = APPOConfig.load(ROOT / "examples/qwen2_5_vl_7b_8gpu.yaml")
    assert (config.shard, config.lora_rank, config.prompts_per_step % 8) == ("fsdp", 0, 0)


# GPUs of one node, and of eight.
@pytest.mark.parametrize("name, processes", [("node", 8), ("nodes", 64)])
def test_launch_files_are_those_of_accelerate(name, processes):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / f"examples/launch/{name}.yaml"))
    assert (config.num_processes, config.mixed_precision, config.use_cpu) == (processes, "no", False)
    assert not config.deepspeed_config and not config.fsdp_config


def test_the_slurm_script_starts_a_process_a_gpu_on_each_node(tmp_path):
    """With commands in the place of Slurm's and torchrun, which say what they are called with."""
    for name, text in (
        ("scontrol", 'echo first-node; seq 100000'),  # more than a pipe holds: all is read, or it is killed
        ("srun", 'shift; SLURM_NODEID=1 "$@"'),
        ("torchrun", 'printf "%s\\n" "$@"'),
    ):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    done = subprocess.run(
        ["bash", ROOT / "examples/launch/slurm.sh", "run.yaml", "learning_rate=2e-6", "model=a b"],
        capture_output=True, text=True, timeout=60, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "--nnodes", "2", "--node_rank", "1", "--nproc_per_node", "8", "--master_addr", "first-node", "--master_port",
        "29500", "-m", "appo", "train", "run.yaml", "learning_rate=2e-6", "model=a b",
    ]  # fmt: skip


def test_importing_the_packages_is_light():
    """The operators need torch and triton only, and naming appo loads nothing."""
    code = (
        "import sys, appo; assert 'torch' not in sys.modules\n"
        "import appo_kernels; assert 'transformers' not in sys.modules and 'appo.train.trainer' not in sys.modules\n"
        "assert not {'accelerate', 'numpy.testing', 'rich', 'omegaconf'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
