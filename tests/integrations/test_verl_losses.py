"""Kinds of the surrogate against verl's own losses; what the docs say of its options."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: `make test-integrations` has an environment with it")
pytest.importorskip("transfer_queue", reason="verl's trainer needs it: `make test-integrations`")

import verl_cpu  # noqa: F401  (the platform comes before anything of verl)
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.workers.config.actor import ActorConfig, PolicyLossConfig

from appo_kernels.ops.weighted_surrogate.kinds import KINDS
from benchmarks import peer_verl
from benchmarks.peer_losses import ALLOWED, compare

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
DOCS = (Path(__file__).parents[2] / "docs/losses.md").read_text()


# float32 as trained; float64, where a wrong formula cannot hide behind rounding.
@pytest.mark.parametrize("dtype", ALLOWED)
def test_every_kind_is_verls_in_all_three_forms(dtype: torch.dtype) -> None:
    rows = compare(peer_verl.cases(), dtype)
    assert {kind for kind, *_ in peer_verl.LOSS_MODES.values()} == set(KINDS)
    assert {row["loss_type"] for row in rows} == set(peer_verl.LOSS_MODES) and all(row["cases"] >= 14 for row in rows)


def test_the_docs_name_every_loss_and_option_of_the_actors_loss() -> None:
    assert len(POLICY_LOSS_REGISTRY) >= 12
    names = [*POLICY_LOSS_REGISTRY, *peer_verl.AGGREGATIONS]
    names += [field.name for kind in (PolicyLossConfig, RolloutCorrectionConfig) for field in fields(kind)]
    loss = ("clip", "loss", "tau", "entropy_coeff", "kl", "ppo_epochs", "ppo_mini", "shuffle", "calculate")
    names += [field.name for field in fields(ActorConfig) if field.name.startswith(loss) or "kl_loss" in field.name]
    missing = [name for name in names if name not in DOCS and name != "_target_"]
    assert not missing, missing
