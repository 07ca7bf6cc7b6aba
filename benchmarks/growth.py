"""Growth of time and memory: python -m benchmarks.growth

One size at a time is doubled, the others stay; an exponent is the slope of a line through the logarithms of the points,
least squares: 1 is linear, 0 flat. Memory is the peak beyond the arguments, results included. Writes results/growth-*
as .json, .csv and .png.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from appo_kernels import (
    GroupLayout,
    frame_mass,
    group_attention,
    group_divergence,
    linear_weighted_surrogate,
    token_logprobs,
)
from benchmarks import harness, plots


@dataclass
class Sweep:
    """work(value) -> the function to measure."""

    op: str
    axis: str
    values: Sequence[int]
    work: Callable[[int], Callable[[], object]]
    fixed: str


def attention(device: str, **changed: int) -> Callable[[], object]:
    """frame_mass from a given lse, query heads on one key head."""
    sizes = {"keys": 4096, "frames": 16, "rows": 256, "heads": 7} | changed
    keys, frames, rows, heads = (sizes[name] for name in ("keys", "frames", "rows", "heads"))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, rows, 128, generator=generator).to(device)
    key = torch.randn(1, 1, keys, 128, generator=generator).to(device)
    ids = (torch.arange(keys) * frames // keys).int()[None].to(device)
    lse = torch.stack([(one @ key[0, 0].t()).mul_(128**-0.5).logsumexp(-1) for one in query[0]])[None]
    return lambda: frame_mass(query, key, ids, num_frames=frames, lse=lse)


def packed_groups(device: str, **changed: int) -> Callable[[], object]:
    """group_attention, forward and backward."""
    sizes = {"prompt": 1024, "response": 128, "responses": 4} | changed
    layout = GroupLayout([sizes["prompt"]], [[sizes["response"]] * sizes["responses"]])
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, layout.tokens, 64, generator=generator).to(device).requires_grad_() for heads in (2, 1, 1)
    ]
    upstream = torch.randn(inputs[0].shape, generator=generator).to(device)

    def run() -> object:
        out, lse = group_attention(*inputs, layout)
        return out, lse, torch.autograd.grad(out, inputs, upstream)

    return run


def vocabulary(device: str, **changed: int) -> dict[str, Any]:
    sizes = {"group": 8, "tokens": 32, "vocabulary": 32_768, "hidden": 256} | changed
    generator = torch.Generator().manual_seed(0)
    G, N, D, V = (sizes[name] for name in ("group", "tokens", "hidden", "vocabulary"))
    hidden = torch.randn(G, N, D, generator=generator).to(device)
    weight = torch.randn(V, D, generator=generator).mul_(D**-0.5).to(device)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.randint(V, (G, N), generator=generator).to(device),
        "slots": torch.stack([torch.randperm(N, generator=generator)[:16].sort().values for _ in range(2 * G)])
        .view(2, G, 16)
        .to(device),
    }


def divergence(device: str, **changed: int) -> Callable[[], object]:
    work = vocabulary(device, **changed)
    hidden = work["hidden"]
    lse = token_logprobs(hidden.flatten(0, 1), work["weight"], work["targets"].flatten()).lse.view(hidden.shape[:2])
    return lambda: group_divergence(hidden, work["weight"], lse, work["slots"])


def logprobs(device: str, **changed: int) -> Callable[[], object]:
    work = vocabulary(device, **changed)
    return lambda: token_logprobs(work["hidden"].flatten(0, 1), work["weight"], work["targets"].flatten())


def surrogate(device: str, **changed: int) -> Callable[[], object]:
    """Forward alone makes the gradients as well; they are results and grow with hidden and weight."""
    work = vocabulary(device, **changed)
    hidden = work["hidden"].requires_grad_()
    old = torch.full(hidden.shape[:2], -math.log(work["weight"].shape[0]), device=device)
    advantages = torch.linspace(-1, 1, hidden.shape[0], device=device)
    arguments = hidden, work["weight"], work["targets"], old, advantages, torch.ones_like(old)
    return lambda: linear_weighted_surrogate(*arguments).loss


def sweeps(device: str) -> list[Sweep]:
    """Ranges start where the operators' tiles, of a fixed size, are full: below, memory grows until they are."""
    one = {"heads": 1}
    keys, rows = (8192, 16_384, 32_768, 65_536, 131_072), (1024, 2048, 4096, 8192, 16_384)
    frames, groups = (128, 512, 2048, 4096), (2, 4, 8, 16)
    words, tokens = (65_536, 131_072, 262_144, 524_288), (64, 128, 256, 512)
    thin = {"hidden": 64, "tokens": 64}

    def vocabulary_of(work: Callable[..., Any]) -> Callable[[int], Any]:
        return lambda v: work(device, vocabulary=v, **thin)

    def tokens_of(work: Callable[..., Any]) -> Callable[[int], Any]:
        return lambda v: work(device, vocabulary=65_536, hidden=64, tokens=v)

    by_words, by_tokens = "512 tokens, D 64", "8 responses, D 64, V 65,536"
    prompts, responses = (1024, 2048, 4096, 8192, 16_384), (256, 512, 1024, 2048, 4096)
    return [
        Sweep("frame_mass", "keys", keys, lambda v: attention(device, keys=v), "7/1 heads, 256 rows, 16 frames"),
        Sweep(
            "frame_mass", "rows", rows, lambda v: attention(device, rows=v, keys=1024, frames=1024, **one),
            "1 head, 1,024 frames, 1,024 keys",
        ),
        Sweep(
            "frame_mass", "frames", frames, lambda v: attention(device, frames=v, rows=4096, **one),
            "1 head, 4,096 rows, 4,096 keys",
        ),
        Sweep("group_divergence", "vocabulary", words, vocabulary_of(divergence), by_words),
        Sweep("group_divergence", "group", groups, lambda v: divergence(device, group=v), "V 32,768, D 256"),
        Sweep("token_logprobs", "vocabulary", words, vocabulary_of(logprobs), by_words),
        Sweep("token_logprobs", "tokens", tokens, tokens_of(logprobs), by_tokens),
        Sweep("linear_weighted_surrogate", "vocabulary", words, vocabulary_of(surrogate), f"{by_words}, frozen head"),
        Sweep("linear_weighted_surrogate", "tokens", tokens, tokens_of(surrogate), f"{by_tokens}, frozen head"),
        Sweep(
            "group_attention", "prompt", prompts, lambda v: packed_groups(device, prompt=v),
            "2/1 heads, d 64, 4 responses of 128, forward and backward",
        ),
        Sweep(
            "group_attention", "response", responses, lambda v: packed_groups(device, response=v),
            "2/1 heads, d 64, 4 responses, prompt 1,024, forward and backward",
        ),
    ]  # fmt: skip


def measure(sweep: Sweep, device: str, rounds: int) -> list[dict[str, Any]]:
    """Each point after the other, ``rounds`` times around; the least time of each."""
    runs = {value: harness.Entry(str(value), "ours", sweep.work(value)) for value in sweep.values}
    times: dict[int, list[float]] = {value: [] for value in runs}
    for _ in range(rounds + 1):
        for value, run in runs.items():
            times[value].append(harness.timed(run, device))
    return [
        {
            "op": sweep.op,
            "axis": sweep.axis,
            "fixed": sweep.fixed,
            "value": value,
            "seconds": min(times[value][1:]),
            "extra_bytes": harness.memory(run, device),
            "commit": harness.commit(),
        }
        for value, run in runs.items()
    ]


def exponent(rows: Sequence[dict[str, Any]], quantity: str) -> float:
    """Slope of log(quantity) over log(value); below a page of 4 KiB memory counts as one."""
    x = [math.log(row["value"]) for row in rows]
    y = [math.log(max(row[quantity], 4096 if quantity == "extra_bytes" else 1e-9)) for row in rows]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def draw(rows: list[dict[str, Any]], fits: list[dict[str, Any]], path: Any) -> None:
    """A panel per sweep: time and memory relative to the first point, beside a dashed line for linear growth."""
    pyplot = plots.pyplot()
    columns = 3
    lines = -(-len(fits) // columns)
    figure, panels = pyplot.subplots(lines, columns, figsize=(12, 3.1 * lines), sharex=True, sharey=True, squeeze=False)
    for panel, fit in zip(panels.flat, fits, strict=False):
        points = [row for row in rows if (row["op"], row["axis"]) == (fit["op"], fit["axis"])]
        x = [row["value"] / points[0]["value"] for row in points]
        panel.plot([1, 32], [1, 32], color="0.7", linestyle="--", linewidth=1, label="linear")
        for quantity, name, role in (("seconds", "time", "peer"), ("extra_bytes", "memory", "ours")):
            least = 4096 if quantity == "extra_bytes" else 1e-9
            y = [max(row[quantity], least) / max(points[0][quantity], least) for row in points]
            panel.plot(
                x, y, marker="o", markersize=4, color=plots.COLOURS[role], label=f"{name}: size^{fit[quantity]:.2f}"
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_title(f"{fit['op']}: {fit['axis']}", fontsize=9, loc="left", fontweight="bold")
        panel.legend(fontsize=8, loc="upper left")
        panel.grid(alpha=0.3)
    figure.supxlabel("size, first point = 1", fontsize=9)
    figure.supylabel("time and peak extra memory, first point = 1", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="an operator: the other sweeps of the result files stay")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = f"growth-{options.device}"
    old = (options.only and harness.resumed(name)) or {"rows": [], "fits": []}
    rows, fits = ([row for row in old[part] if row["op"] != options.only] for part in ("rows", "fits"))
    for sweep in (sweep for sweep in sweeps(options.device) if options.only in (None, sweep.op)):
        found = measure(sweep, options.device, options.rounds)
        fit = {"op": sweep.op, "axis": sweep.axis, "fixed": sweep.fixed}
        fit |= {quantity: exponent(found, quantity) for quantity in ("seconds", "extra_bytes")}
        rows, fits = rows + found, fits + [fit]
        most = max(row["extra_bytes"] for row in found) / 2**20
        print(
            f"{sweep.op:26s} {sweep.axis:11s} time {fit['seconds']:5.2f}  memory {fit['extra_bytes']:5.2f}  "
            f"(at most {most:.1f} MiB)  {sweep.fixed}",
            flush=True,
        )
    path = harness.save(name, rows, device=options.device, fits=fits)
    draw(rows, fits, path.with_suffix(".png"))
    print(f"written: {path}, .csv, .png")


if __name__ == "__main__":
    main()
