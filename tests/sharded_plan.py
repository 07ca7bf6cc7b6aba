"""Memory of a sharded model in one process of several over gloo, for tests of the plan; prints one JSON line.

python tests/sharded_plan.py '{"lora_rank": 0, "gradient_checkpointing": false, "dtype": "float32"}'
"""

import faulthandler
import json
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import training
from published_models import build, small

from appo.models.architectures import Architecture
from appo.planning.plan import Plan
from appo.planning.workload import Workload
from appo.train.launch import processes
from appo.train.policy import Policy
from appo.train.setup import autocast, build_optimizer, prepare_model
from appo.train.sharding import gathered, own, place
from appo_kernels import linear_weighted_surrogate
from appo_kernels.testing import peak_extra_bytes

B, P, N = 4, 40, 56


def sizes() -> Architecture:
    """Large enough for the parameters to stand out from what else the allocator holds."""
    base = small("Qwen2.5-VL-7B")
    return replace(
        base, layers=6, hidden=384, intermediate=1024, heads=12, key_heads=4, head_dim=32, vocabulary=4096, tied=False,
        vision=replace(base.vision, out_hidden=384),
    )  # fmt: skip


def plan(lora_rank: int, gradient_checkpointing: bool, dtype: str, checkpoint_every: int = 1) -> Plan:
    work = Workload(
        gpus=2, prompts=2, frames=1, frame_tokens=1, text=P - 1 - sizes().frame_text, response=N, responses=B,
        mixed=dtype == "bfloat16", lora_rank=lora_rank, checkpointing=gradient_checkpointing,
        checkpoint_every=checkpoint_every,
    )  # fmt: skip
    return Plan(sizes(), work)


def measure(**settings: Any) -> dict[str, int]:
    config = training.config("none", shard="fsdp", freeze_vision=True, **settings)
    mixed = config.dtype == "bfloat16"
    model = build(sizes())
    policy = Policy(prepare_model(model.bfloat16() if mixed and config.lora_rank else model, config), "off")
    place(policy, config, processes(config))
    optimizer = build_optimizer(policy, config)
    ids, mask = torch.randint(3, 4096, (B, P + N)), torch.ones(B, P + N, dtype=torch.long)
    mask[:, :3] = 0

    def loss() -> torch.Tensor:
        hidden = policy.causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = hidden[:, P - 1 : P - 1 + N].to(torch.bfloat16 if mixed else torch.float32)
        old, advantages, weights = torch.full((B, N), -6.0), torch.linspace(-1, 1, B), torch.ones(B, N)
        weight, _ = policy.output_head(hidden.dtype)
        return linear_weighted_surrogate(hidden, weight, ids[:, P:], old, advantages, weights).loss

    def step() -> None:
        with autocast(config, torch.device("cpu")):
            found = policy.run(loss)
        found.backward()

    step()
    optimizer.step()  # gradients and the optimizer's state are there from now on, as for a second micro-batch
    with gathered(policy):
        whole = sum(parameter.nbytes for parameter in policy.parameters())
    state = [own(x).nbytes for values in optimizer.state.values() for x in values.values() if x.dim()]
    return {
        "weights": sum(own(parameter).nbytes for parameter in policy.parameters()),
        "optimizer": sum(state),
        "update": peak_extra_bytes(step),
        "rollout": whole,
    }


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)
    torch.set_num_threads(1)
    print(json.dumps(measure(**json.loads(sys.argv[1]))), flush=True)
    dist.destroy_process_group()
