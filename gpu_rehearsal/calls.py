"""Every public operator on every backend that it has on a GPU, small and with all its arguments used."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import appo_kernels as kernels

Run = Callable[[], Tensor | None]  # the forward; where it returns a loss, the backward is run as well
BACKENDS = ("torch", "triton", "cuda")


@dataclass(frozen=True)
class Call:
    name: str  # "operator backend, what is special"
    prepare: Callable[[], Run]  # makes the inputs


def attention_inputs(*, grad: bool, lse: bool = False, prefix: bool = False) -> dict[str, Any]:
    """Two sequences of 110 keys, 40 rows, 6 frames of 9 keys."""
    B, Hq, Hkv, R, S, d, F, frame_keys = 2, 14, 2, 40, 110, 64, 6, 9
    made = [
        torch.randn(B, heads, n, d, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
        for heads, n in ((Hq, R), (Hkv, S), (Hkv, S))
    ]
    ids = torch.full((B, S), -1, dtype=torch.int32, device="cuda")
    ids[:, 5 : 5 + F * frame_keys] = torch.arange(F * frame_keys, dtype=torch.int32, device="cuda") // frame_keys
    last = torch.arange(S - R, S, device="cuda").expand(B, R)
    options: dict[str, Any] = {"num_frames": F, "first_key": torch.zeros_like(last), "last_key": last}
    if prefix:
        options["prefix_keys"] = torch.full_like(last, 8)
    if lse:
        options["lse"] = torch.randn(B, Hq, R, device="cuda") + 5
    return {"query": made[0], "key": made[1], "value": made[2], "ids": ids, "options": options}


def frame_mass(backend: str, *, grad: bool = False, lse: bool = False, plan: bool = False) -> Run:
    inputs = attention_inputs(grad=grad, lse=lse)
    query, key, ids, options = inputs["query"], inputs["key"], inputs["ids"], inputs["options"]
    out = None if grad else torch.zeros(2, 40, 6, device="cuda")
    frames: tuple[Tensor, ...] = (ids,)
    if plan:
        made = kernels.FramePlan.build(ids, options.pop("num_frames"), **{k: options.pop(k) for k in list(options)})
        kernels.frame_mass(query, key, plan=made, reduction="mean", backend=backend)  # the first layer
        frames, options = (), {"plan": made}

    def run() -> Tensor | None:
        mass = kernels.frame_mass(query, key, *frames, reduction="mean", out=out, backend=backend, **options)
        return mass.sum() if grad else None

    return run


def frame_attention(backend: str, *, grad: bool = False) -> Run:
    inputs = attention_inputs(grad=grad, prefix=True)

    def run() -> Tensor | None:
        result = kernels.frame_attention(
            inputs["query"], inputs["key"], inputs["value"], inputs["ids"], backend=backend, **inputs["options"]
        )
        return result.out.float().sum() + result.lse.sum() + result.mass.sum() if grad else None

    return run


G, N, D, V, K, J = 4, 12, 32, 704, 2, 5  # responses, tokens, hidden size, vocabulary, slots' frames and tokens


def head_inputs(*, grad: bool, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    hidden, weight, offset = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
        for shape in ((G, N, D), (V, D), (V,))
    )
    return hidden, weight, offset if bias else None, torch.randint(V, (G, N), device="cuda")


def token_logprobs(backend: str, *, grad: bool = False, bias: bool = False) -> Run:
    hidden, weight, offset, targets = head_inputs(grad=grad, bias=bias)

    def run() -> Tensor | None:
        result = kernels.token_logprobs(
            hidden.flatten(0, 1), weight, targets.flatten(), bias=offset, temperature=0.9, backend=backend
        )
        return result.logprobs.sum() + result.entropy.sum() if grad else None

    return run


def group_divergence(backend: str, *, kind: str, from_logits: bool = False) -> Run:
    slots, lse = torch.randint(-1, N, (K, G, J), device="cuda"), torch.randn(G, N, device="cuda") + 8
    hidden, weight, _, _ = head_inputs(grad=False)
    logits = torch.randn(G, N, V, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        if from_logits:
            kernels.group_divergence_from_logits(logits, lse, slots, kind=kind, backend=backend)
        else:
            kernels.group_divergence(hidden, weight, lse, slots, kind=kind, backend=backend)

    return run


def loss_inputs() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    old, mask = -torch.rand(G, N, device="cuda") * 5, torch.rand(G, N, device="cuda") > 0.2
    return (old, torch.randn(G, device="cuda"), mask), {"token_weights": 1 + torch.rand(G, N, device="cuda")}


def weighted_surrogate(backend: str, **options: Any) -> Run:
    positional, named = loss_inputs()
    logprobs = (-torch.rand(G, N, device="cuda")).requires_grad_()
    return lambda: kernels.weighted_surrogate(logprobs, *positional, backend=backend, **named, **options).loss


def logits_weighted_surrogate(backend: str, **options: Any) -> Run:
    positional, named = loss_inputs()
    logits = torch.randn(G, N, V, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets, layer = torch.randint(V, (G, N), device="cuda"), logits * 1

    return lambda: (
        kernels.logits_weighted_surrogate(
            layer, targets, *positional, backend=backend, inplace=True, entropy_coef=0.1, **named, **options
        ).loss
    )


def linear_weighted_surrogate(backend: str, *, bias: bool = False, **options: Any) -> Run:
    positional, named = loss_inputs()
    hidden, weight, offset, targets = head_inputs(grad=True, bias=bias)

    return lambda: (
        kernels.linear_weighted_surrogate(
            hidden, weight, targets, *positional, bias=offset, backend=backend, num_items=37, **named, **options
        ).loss
    )


def calls() -> Iterator[Call]:
    for b in BACKENDS:
        yield Call(f"frame_mass {b}, lse", lambda b=b: frame_mass(b, lse=True))
        yield Call(f"frame_mass {b}", lambda b=b: frame_mass(b))
        yield Call(f"frame_mass {b}, second layer of a plan", lambda b=b: frame_mass(b, plan=True))
        yield Call(f"frame_mass {b}, gradient", lambda b=b: frame_mass(b, grad=True))
        yield Call(f"frame_attention {b}", lambda b=b: frame_attention(b))
        yield Call(f"frame_attention {b}, gradient", lambda b=b: frame_attention(b, grad=True))
        if b != "cuda":  # which has no kernels of this operator
            yield Call(f"token_logprobs {b}", lambda b=b: token_logprobs(b))
            yield Call(f"token_logprobs {b}, gradient, bias", lambda b=b: token_logprobs(b, grad=True, bias=True))
        for kind in ("kl", "k3"):
            yield Call(f"group_divergence {b}, {kind}", lambda b=b, k=kind: group_divergence(b, kind=k))
            yield Call(
                f"group_divergence_from_logits {b}, {kind}",
                lambda b=b, k=kind: group_divergence(b, kind=k, from_logits=True),
            )
        yield Call(f"weighted_surrogate {b}", lambda b=b: weighted_surrogate(b))
        yield Call(f"logits_weighted_surrogate {b}", lambda b=b: logits_weighted_surrogate(b))
        yield Call(f"linear_weighted_surrogate {b}", lambda b=b: linear_weighted_surrogate(b))
        yield Call(
            f"linear_weighted_surrogate {b}, sequence", lambda b=b: linear_weighted_surrogate(b, level="sequence")
        )
        yield Call(f"linear_weighted_surrogate {b}, bias", lambda b=b: linear_weighted_surrogate(b, bias=True))
