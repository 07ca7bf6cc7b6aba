"""Our surrogate against the loss code of TRL and verl, run as installed: python -m benchmarks.peer_losses [--peer verl]

TRL's ``GRPOTrainer._compute_loss`` is called on a stand-in for its trainer, verl's ``ppo_loss`` on a batch as its
engine has it; nothing of them is written again here (`benchmarks.peer_trl`, `benchmarks.peer_verl` have the settings).
Every loss that is a kind of ours, from log-probabilities, logits and hidden states, in float32 and float64. Token
weights are folded into (B, T) advantages for the peer. Writes benchmarks/results/peer-losses-cpu.json, or
peer-losses-verl-cpu.json.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from appo_kernels import linear_weighted_surrogate, logits_weighted_surrogate, weighted_surrogate
from appo_kernels.dtypes import dtype_name
from benchmarks import harness
from benchmarks.peer_cases import TEMPERATURE, Batch, Case, batch_of

# float32: sums in another order. float64: the same formula, to the last digits.
ALLOWED = {torch.float32: 2e-6, torch.float64: 1e-12}
# From log-probabilities, and from what they are made of.
FORMS = {"logprobs": "", "logits": ", from logits", "hidden": ", from hidden states"}
MEASURES = [f"{measure}{suffix}" for suffix in FORMS.values() for measure in ("loss", "gradient")]


def compare(cases: Iterable[Case], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Per loss the largest differences over its settings: relative to the loss where it is over 1,
    gradients to their largest entry.

    Raises:
        ValueError: a difference beyond ``ALLOWED`` and what the peer's formula brings in.
    """
    batch, rows = batch_of(dtype), {}
    for case in cases:
        row = rows.setdefault(
            case.loss, {"loss_type": case.loss, "dtype": dtype_name(dtype), "cases": 0} | dict.fromkeys(MEASURES, 0.0)
        )
        row["cases"] += 1
        for measure, difference in differences(case, batch).items():
            if not difference <= ALLOWED[dtype] + case.slack:
                allowed = f"{ALLOWED[dtype] + case.slack:.0e}"
                raise ValueError(f"{case.loss}, {dtype}: {measure} off by {difference:.1e}, allowed {allowed}: {case}")
            row[measure] = max(row[measure], difference)
    return list(rows.values())


def differences(case: Case, batch: Batch) -> dict[str, float]:
    """Of one setting, in each form; the entropy bonus is of the forms that see logits."""
    hidden, weight = (batch[name].clone().requires_grad_() for name in ("hidden", "weight"))
    raw = hidden @ weight.t()
    logp = (raw / TEMPERATURE).log_softmax(-1)
    logprobs = logp.gather(-1, batch["targets"][..., None])[..., 0]
    theirs = case.theirs(batch, logprobs, -(logp.exp() * logp).sum(-1))
    expected = torch.autograd.grad(theirs, (logprobs, raw, hidden, weight), retain_graph=True)

    shared, scale = case.ours(batch), case.scale(batch)
    positional = (batch["targets"], batch["old"], shared.pop("advantages"), shared.pop("mask"))
    logits = shared | {"temperature": TEMPERATURE}
    bonus = shared.pop("entropy_coef")
    leaf, logits_leaf = (tensor.detach().requires_grad_() for tensor in (logprobs, raw))
    results = {
        "logits": (logits_weighted_surrogate(logits_leaf, *positional, **logits).loss, (logits_leaf,), expected[1:2]),
        "hidden": (
            linear_weighted_surrogate(hidden, weight, *positional, **logits).loss,
            (hidden, weight),
            expected[2:],
        ),
    }
    if bonus == 0:
        results["logprobs"] = (weighted_surrogate(leaf, *positional[1:], **shared).loss, (leaf,), expected[:1])
    found = {}
    for form, (loss, leaves, wanted) in results.items():
        off = abs(float((scale * loss - theirs).detach()))
        found[f"loss{FORMS[form]}"] = off / max(1.0, abs(float(theirs.detach())))
        gradients = torch.autograd.grad(scale * loss, leaves)
        found[f"gradient{FORMS[form]}"] = max(_relative(g, w) for g, w in zip(gradients, wanted, strict=True))
    return found


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def main() -> None:
    from benchmarks import peer_trl, peer_verl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("trl", "verl"), default="trl")
    peer = parser.parse_args().peer
    cases = list({"trl": peer_trl, "verl": peer_verl}[peer].cases())
    try:
        rows = [row for dtype in ALLOWED for row in compare(cases, dtype)]
    except ValueError as error:
        raise SystemExit(f"peer_losses: {error}") from error
    print(f"{peer + ' loss':10} {'dtype':8} {'cases':>5} " + " ".join(f"{name:>28}" for name in MEASURES))
    for row in rows:
        print(
            f"{row['loss_type']:10} {row['dtype']:8} {row['cases']:5} " + " ".join(f"{row[n]:28.1e}" for n in MEASURES)
        )
    print(harness.save("peer-losses-cpu" if peer == "trl" else "peer-losses-verl-cpu", rows, device="cpu"))


if __name__ == "__main__":
    main()
