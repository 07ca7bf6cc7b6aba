"""Kinds, corrections and filters of the surrogate against TRL's own code; what the docs say of its options."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: `make test-integrations` has an environment with it")
pytest.importorskip("datasets", reason="TRL needs datasets: `make test-integrations`")

import test_trl as shared
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from appo_kernels import weighted_surrogate
from benchmarks import peer_trl
from benchmarks.peer_losses import ALLOWED, compare

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


# float32 as trained; float64, where a wrong formula cannot hide behind rounding.
@pytest.mark.parametrize("dtype", ALLOWED)
def test_every_loss_is_trls_in_all_three_forms(dtype: torch.dtype) -> None:
    rows = compare(peer_trl.cases(), dtype)
    assert {row["loss_type"] for row in rows} == set(peer_trl.LOSS_TYPES) and all(row["cases"] >= 40 for row in rows)


# Each mode with the bounds that it has: none below, or both.
@pytest.mark.parametrize(
    ("mode", "low", "ours"),
    [
        ("token_truncate", None, {"rollout_correction": "truncate"}),
        ("token_truncate", 0.8, {"rollout_correction": "clip", "rollout_floor": 0.8}),
        ("token_mask", 0.8, {"rollout_correction": "mask", "rollout_floor": 0.8}),
        ("sequence_truncate", None, {"rollout_correction": "truncate", "rollout_level": "sequence"}),
        ("sequence_mask", 0.5, {"rollout_correction": "mask", "rollout_floor": 0.5, "rollout_level": "sequence"}),
    ],
)
def test_the_correction_of_rollouts_is_trls(mode: str, low: float | None, ours: dict[str, Any], tmp_path: Any) -> None:
    """The ratio that TRL makes while scoring, from log-probabilities that an engine is said to have had."""
    made = shared.trainer(
        tmp_path, "text", cls=GRPOTrainer, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=1.3,
    )  # fmt: skip
    made.model.train()
    made.use_vllm = True
    lengths, rows = [9, 1, 5, 7], [made.train_dataset[0] for _ in range(4)]

    def scored(sampled: list[list[float]]) -> dict[str, Any]:
        made._generate_single_turn = lambda ids, *_, **__: ([list(range(5, 5 + n)) for n in lengths], sampled)
        return made._generate_and_score_completions(rows)

    own = scored([[0.0] * n for n in lengths])["old_per_token_logps"]
    near = own + 0.15 * torch.randn(own.shape, generator=torch.Generator().manual_seed(2))
    near[0, 3] = torch.nan
    output = scored([row[:n].tolist() for row, n in zip(near, lengths, strict=True)])
    old, mask = output["old_per_token_logps"], output["completion_mask"]
    theirs = output["importance_sampling_ratio"].expand_as(old) * mask
    # The slope of -A c log pi with A = -1, summed, is the correction c.
    logprobs = torch.zeros_like(old, requires_grad=True)
    loss = weighted_surrogate(
        logprobs, old, -torch.ones(len(old)), mask, kind="gpg", aggregation="dapo", num_items=1,
        rollout_logprobs=output["sampling_per_token_logps"], rollout_cap=1.3, **ours,
    ).loss  # fmt: skip
    (found,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6)
    assert found[0, 3] == 1 or "sequence" in mode
    assert int((theirs != 0).sum()) > 0 and len(theirs[mask.bool()].unique()) > 1


def test_the_docs_name_every_option_of_trl() -> None:
    """Those that its GRPOConfig adds to those of any trainer."""
    text = (Path(__file__).parents[2] / "docs/losses.md").read_text()
    own = GRPOConfig.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys()
    missing = [name for name in sorted(own) if name not in text]
    assert len(own) > 60 and not missing, missing
