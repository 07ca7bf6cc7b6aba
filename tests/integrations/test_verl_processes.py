"""verl's FSDP2 engine with ours in two gloo processes on a CPU, a group in each: weights, and the gradient of all."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: `make test-integrations` has an environment with it")
pytest.importorskip("transfer_queue", reason="verl's trainer needs it: `make test-integrations`")

import test_verl as shared
import verl_cpu
from two_processes import run_two
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from appo.integrations import verl_trainer
from appo.tasks.tiny import build_tiny
from appo_kernels import weighted_surrogate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
G = shared.G


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def reference(model: Any, data: Any, weights: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the whole batch in one process, from all logits of each sequence alone."""
    found = []
    columns = [data[name].unbind() for name in ("input_ids", "responses", "position_ids")]
    for ids, response, positions, media in zip(*columns, data["multi_modal_inputs"], strict=True):
        out = model(
            input_ids=ids[None], position_ids=positions[:, None], use_cache=False, **media,
            mm_token_type_ids=(ids[None] == model.config.video_token_id).int() * 2,
        )  # fmt: skip
        rows = (out.logits[0, -len(response) - 1 : -1] / shared.TEMPERATURE).log_softmax(-1)
        found.append(rows.gather(-1, response[:, None])[:, 0])
    logprobs, weight, old, advantages, mask = (
        shared.padded(list(rows))
        for rows in (
            found,
            weights,
            *(data[name].unbind() for name in ("old_log_probs", "advantages", "response_mask")),
        )
    )
    loss = weighted_surrogate(
        logprobs, old, advantages * weight, mask, eps_low=0.2, eps_high=0.2, delta=3.0
    ).loss  # fmt: skip
    loss.backward()
    return float(loss.detach()), flat({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def one_process(folder: Path, rank: int) -> None:
    model, processor = build_tiny(0, family="qwen2_5_vl")
    data = shared.batch(model, processor)
    _, _, wanted = shared.expected(model, data)
    model.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(len(row), generator=generator) for row in data["responses"].unbind()]
    data["old_log_probs"], data["advantages"] = shared.nested([x / 5 - 4.4 for x in rows]), shared.nested(rows)
    loss, gradient = reference(model, data, wanted)
    with verl_cpu.process(folder, rank, 2):
        engine = shared.engine_of(folder)
        own = tu.index_select_tensor_dict(data, list(range(rank * G, rank * G + G)))
        settings = verl_trainer.settings_of(shared.config())
        with engine.eval_mode():
            scored = shared.asked(own, appo=settings, force_group_size=G)
            found = engine.infer_batch(scored)["model_output"]["token_weights"]
        shared.assert_close(found, wanted[rank * G : rank * G + G], 1e-3)
        own["token_weights"] = found
        tu.assign_non_tensor(own, global_batch_size=2 * G)
        actor = ActorConfig(strategy="fsdp2", rollout_n=G, use_dynamic_bsz=True, ppo_mini_batch_size=2 * G)
        with engine.train_mode():
            output = engine.forward_backward_batch(shared.asked(own), partial(ppo_loss, actor))
            named = engine.module.named_parameters()
            got = {name: p.grad.full_tensor() for name, p in named if p.grad is not None}
        parts = [torch.zeros(()) for _ in range(2)]
        torch.distributed.all_gather(parts, torch.tensor(float(sum(output["loss"]))))
    mean = float(torch.stack(parts).mean())  # verl multiplies by the processes
    assert abs(mean - loss) <= 1e-3 * max(1.0, abs(loss)), (parts, loss)
    error = float((flat(got) - gradient).norm() / gradient.norm())
    assert error <= 1e-3, error


def test_two_processes_weigh_and_train_as_one(tmp_path: Path) -> None:
    model, processor = build_tiny(0, family="qwen2_5_vl")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    script = (
        "import os, pathlib, sys, test_verl_processes as own\n"
        "own.one_process(pathlib.Path(sys.argv[1]), int(os.environ['RANK']))"
    )
    ends = run_two("-W", "ignore", "-c", script, str(tmp_path), timeout=250)
    assert [status for status, _ in ends] == [0, 0], ends
