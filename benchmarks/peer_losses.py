"""Our surrogate against the loss code of TRL itself, run as installed: python -m benchmarks.peer_losses

``GRPOTrainer._compute_loss`` is called on a stand-in for its trainer that hands it log-probabilities; nothing of it is
written again here. Every loss type that is a setting of ours, at both levels, with and without two-sided clipping, KL,
truncated importance sampling and token weights (folded into (B, T) advantages), in float32 and float64. Writes
benchmarks/results/peer-losses-cpu.json.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from appo_kernels import linear_weighted_surrogate, weighted_surrogate
from appo_kernels.dtypes import dtype_name
from benchmarks import harness

NAME = "peer-losses-cpu"
EPS_LOW, EPS_HIGH, CAP, MAX_LENGTH, ACCUMULATION = 0.2, 0.28, 1.3, 16, 2
# TRL's loss type -> our kind and aggregation. Its cispo clamps at epsilon_high itself, ours at 1 + eps_high.
LOSS_TYPES = {
    "dapo": ("clip", "dapo"), "grpo": ("clip", "grpo"), "bnpo": ("clip", "bnpo"), "dr_grpo": ("clip", "dr_grpo"),
    "cispo": ("cispo", "dapo"), "sapo": ("sapo", "grpo"),
}  # fmt: skip
# float32: sums in another order. float64: the same formula, to the last digits.
ALLOWED = {torch.float32: 2e-6, torch.float64: 1e-12}


def batch_of(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Six responses of up to 11 tokens, V 37, D 16: ratios on both sides of every clip, one response of one token."""
    generator = torch.Generator().manual_seed(seed)
    B, T, V, D = 6, 11, 37, 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = normal(B, T, D), normal(V, D) / 4
    targets = torch.randint(V, (B, T), generator=generator)
    logprobs = (hidden @ weight.t()).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    lengths = torch.tensor([T, 1, 7, 4, T, 9])
    return {
        "hidden": hidden, "weight": weight, "targets": targets, "mask": (torch.arange(T) < lengths[:, None]).to(dtype),
        "old": logprobs + 0.3 * normal(B, T), "ref": logprobs + 0.5 * normal(B, T),
        "rollout": logprobs + 0.3 * normal(B, T), "advantages": normal(B),
        "token_weights": 1 + 1.7 * torch.rand(B, T, generator=generator, dtype=torch.float64).to(dtype),
    }  # fmt: skip


def trl_loss(batch: Mapping[str, Tensor], logprobs: Tensor, loss_type: str, options: Mapping[str, Any]) -> Tensor:
    """TRL's loss of (B, T) log-probabilities, in a micro-batch of a window of ``ACCUMULATION``."""
    from trl import GRPOTrainer

    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x,
        gather_for_metrics=lambda x: x,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        args=SimpleNamespace(
            delta=options["delta"], use_bias_correction_kl=options["kl_ratio"], steps_per_generation=ACCUMULATION,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        ),
        model=SimpleNamespace(training=True), accelerator=accelerator, _metrics={"train": defaultdict(list)},
        current_gradient_accumulation_steps=ACCUMULATION, loss_type=loss_type, beta=options["beta"],
        importance_sampling_level=options["level"], epsilon_low=EPS_LOW,
        epsilon_high=1 + EPS_HIGH if loss_type == "cispo" else EPS_HIGH,
        max_completion_length=MAX_LENGTH, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=options["rollout"], vllm_importance_sampling_correction=True, _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
    )  # fmt: skip
    advantages = batch["advantages"]
    if options["weighted"]:
        advantages = advantages[:, None] * batch["token_weights"]
    empty = batch["targets"][:, :0]
    inputs = {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": batch["targets"], "completion_mask": batch["mask"],
        "advantages": advantages, "old_per_token_logps": batch["old"], "ref_per_token_logps": batch["ref"],
        "importance_sampling_ratio": (batch["old"] - batch["rollout"]).exp().clamp(max=CAP),
        "num_items_in_batch": 2 * batch["mask"].sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def our_options(batch: Mapping[str, Tensor], loss_type: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings in our words; ``num_items`` is TRL's normaliser, per process and accumulation step."""
    kind, aggregation = LOSS_TYPES[loss_type]
    return {
        "kind": kind, "kl_ratio": options["kl_ratio"],
        "token_weights": batch["token_weights"] if options["weighted"] else None,
        "eps_low": EPS_LOW, "eps_high": EPS_HIGH, "delta": options["delta"], "beta": options["beta"],
        "ref_logprobs": batch["ref"] if options["beta"] else None,
        "rollout_logprobs": batch["rollout"] if options["rollout"] else None, "rollout_cap": CAP,
        "level": options["level"], "aggregation": aggregation, "max_length": MAX_LENGTH,
        "num_items": 2 * batch["mask"].sum(),
    }  # fmt: skip


def grid(loss_type: str) -> Iterator[dict[str, Any]]:
    names = ("level", "delta", "rollout", "weighted")
    values = (("token", "sequence"), (None, 1.5), (False, True), (False, True))
    for chosen in itertools.product(*values):
        for beta, kl_ratio in ((0.0, False), (0.04, False), (0.04, True)):
            options = dict(zip(names, chosen, strict=True)) | {"beta": beta, "kl_ratio": kl_ratio}
            if options["delta"] is None or LOSS_TYPES[loss_type][0] == "clip":  # TRL's delta is of the clipped losses
                yield options


def compare(loss_type: str, dtype: torch.dtype) -> dict[str, Any]:
    """Largest differences over the grid: losses absolute, gradients relative to their largest entry."""
    batch = batch_of(dtype)
    worst = {"loss": 0.0, "gradient": 0.0, "loss, from hidden states": 0.0, "gradient, from hidden states": 0.0}
    cases = 0
    for options in grid(loss_type):
        cases += 1
        hidden, weight = (batch[name].clone().requires_grad_() for name in ("hidden", "weight"))
        found = (hidden @ weight.t()).log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
        theirs = trl_loss(batch, found, loss_type, options)
        expected = torch.autograd.grad(theirs, (found, hidden, weight))

        arguments = our_options(batch, loss_type, options)
        scale = (
            1.0 if LOSS_TYPES[loss_type][1] == "dapo" else 1 / ACCUMULATION
        )  # TRL divides means by the steps, "dapo" by tokens
        leaf = found.detach().requires_grad_()
        plain = weighted_surrogate(leaf, batch["old"], batch["advantages"], batch["mask"], **arguments).loss * scale
        (slope,) = torch.autograd.grad(plain, leaf)
        linear = scale * linear_weighted_surrogate(
            hidden, weight, batch["targets"], batch["old"], batch["advantages"], batch["mask"], **arguments
        ).loss  # fmt: skip
        gradients = torch.autograd.grad(linear, (hidden, weight))

        worst["loss"] = max(worst["loss"], abs(float((plain - theirs).detach())))
        worst["gradient"] = max(worst["gradient"], _relative(slope, expected[0]))
        worst["loss, from hidden states"] = max(
            worst["loss, from hidden states"], abs(float((linear - theirs).detach()))
        )
        for got, wanted in zip(gradients, expected[1:], strict=True):
            name = "gradient, from hidden states"
            worst[name] = max(worst[name], _relative(got, wanted))
    return {"loss_type": loss_type, "dtype": dtype_name(dtype), "cases": cases, **worst}


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    rows = [compare(loss_type, dtype) for loss_type in LOSS_TYPES for dtype in ALLOWED]
    names = [name for name in rows[0] if name not in ("loss_type", "dtype", "cases")]
    print(f"{'TRL loss':10} {'dtype':8} {'cases':>5} " + " ".join(f"{name:>28}" for name in names))
    for row in rows:
        print(f"{row['loss_type']:10} {row['dtype']:8} {row['cases']:5} " + " ".join(f"{row[n]:28.1e}" for n in names))
        allowed = ALLOWED[getattr(torch, row["dtype"])]
        off = {name: row[name] for name in names if not row[name] <= allowed}
        if off:
            raise SystemExit(f"peer_losses: {row['loss_type']}, {row['dtype']}: off by {off}, allowed {allowed:.0e}")
    print(harness.save(NAME, rows, device="cpu"))


if __name__ == "__main__":
    main()
