"""docs/performance.md from the results: python -m benchmarks.page

Every figure on the page is read from benchmarks/results; what has not been measured is said to be missing.
"""

import argparse
from pathlib import Path
from typing import Any

from appo.models.architectures import ARCHITECTURES
from appo.planning.plan import GIB, Plan
from appo.planning.workload import Workload
from benchmarks import harness
from benchmarks.credit import page as credit

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
NOT_MEASURED = "Not measured yet."

INTRODUCTION = """# Performance

Written by `python -m benchmarks.page` from `benchmarks/results`; do not edit. `make bench` measures again, and
`make bench-check` compares ratios with the committed ones.

Every entry was compared with the definition in fp64 (or with plain torch, for losses) before it was timed, and
all of a table took turns in one run. *x bound* is the time relative to the matrix products that we do (or the copy, or
the attention), by the vendor's library alone: what keeps more in memory and needs fewer products can beat it. *x ours*
is the time relative to our first row; both are medians over rounds. Memory is the peak beyond the inputs. Shapes and
the rule that cuts them for a CPU are in `benchmarks/shapes.py`.
"""

COST_MODEL = """## Cost model

`appo plan` prints memory and work of a step before anything is loaded. With h the hidden size, q and k the widths of
all query and of all key heads, I the intermediate size, V the vocabulary, S the tokens of a sequence, c the bytes of a
number of the forward (2 under bf16 autocast):

| What | Cost |
|---|---|
| decoder layer, forward | 2 (2hq + 2hk + 3hI) FLOPs a token, and 4 q for each query-key pair: \
S^2 of a sequence (the full square), P (P + 1) / 2 + G (P N + N (N + 1) / 2) of a group behind one prompt |
| backward | 2 x the matrices, 2.5 x attention; 1 x both again with gradient checkpointing |
| head | 2hV a response token: one product to sample, one to score, three in the loss, one more for the rows in slots |
| frame mass | 2 q S a response token and tapped layer |
| weights, gradients, AdamW | 4 + 4 + 8 bytes a trained parameter (2 for 8 with an 8-bit optimizer); 4 a frozen one |
| bf16 copies of weights | 2 bytes a parameter of the decoder layers, kept by autocast |
| activations of a layer | 16h + 10h (8h in fp32) + 4qc + Sc + 4 heads + 4Ic bytes a token, \
2(q + k)c in the place of 4qc + Sc behind one prompt (no mask); Qwen3: 8 (q + k) more |
| with checkpointing | 4h bytes a token and such layer, none with `checkpoint_offload`; one layer in full at work |
| trained tower, a patch | with h and I its own: 7hc + 4 heads + 16h + 8h (2 (4 + c) h + 6h in bf16) + 4Ic bytes a \
layer, Qwen3: 11hc + 4 heads + 2Ic; a frozen one keeps nothing |
| at work, in turns | 2Ic bytes a token; and 4hV + the logits of a micro-batch of at most min(h, 4,096) response \
tokens where they take less than 4hV, else a tile of at most 512 MiB |
| `micro_tokens` | a group that does not fit is split by responses: each part computes the prompt again, and \
activations are those of one part |
| cache while sampling | k (4 + c) bytes a token and layer: keys are fp32, as rotary positions are; a shared prompt \
once for its group, 2kc bytes a token |

Weights, gradients and optimizer are divided by the number of GPUs (or by `shard_group`), activations are not. With
shards an update has two layers and all that is in none (embedding, head, tower) whole, and whole gradients until they
are reduced, in fp32; a rollout has the whole model, unless another engine samples. With `offload` shards take nothing
of the GPU. Tests compare parameters (exactly), FLOPs, activations and peak memory with those of small models, within
10% (`tests/test_plan.py`, `tests/test_planned_memory.py`; shards with two gloo processes,
`tests/test_plan_shards.py`). Time has not been compared with a machine, nor memory with a GPU.
"""


def environment(content: dict[str, Any]) -> str:
    """A line; and one for each other commit whose rows are among those of ``content``."""
    lines = [f"*{described(content['environment'])}*"]
    lines += [f"*Where commit {each['commit']} is named: {described(each)}*" for each in content.get("earlier", ())]
    return "\n\n".join(lines)


def described(e: dict[str, Any]) -> str:
    threads = "1 thread" if e["threads"] == 1 else f"{e['threads']} threads"
    hardware = f"{e['gpu']}, {e['gpu_memory_gib']} GiB" if "gpu" in e else f"{e['cpu']}, {threads}"
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    load = f"; load average before: {e['load_average'][0]}" if "gpu" not in e else ""
    return f"{hardware}; Python {e['python']}, {versions}; commit {e['commit']}, {e['date']}{load}"


def other_commit(content: dict[str, Any], row: dict[str, Any]) -> str:
    """ ", commit X" of a row that was not measured with the latest ones of its file."""
    latest = content["environment"]["commit"]
    return "" if row.get("commit", latest) == latest else f", commit {row['commit']}"


def contest(content: dict[str, Any]) -> list[str]:
    """A table per case."""
    lines, titles = [], []
    for row in content["rows"]:
        title = (row["op"], row["shape"], row["dtype"])
        if title not in titles:
            titles.append(title)
            lines += [
                "", f"**{', '.join(title)}**: {row['work']}{other_commit(content, row)}", "",
                "| | median | quartiles | x bound | x ours | extra memory |", "|---|---|---|---|---|---|",
            ]  # fmt: skip
        numbers = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("ratio", "to_ours")]
        lines.append(
            f"| {row['name']} | {1e3 * row['median']:,.1f} ms | {1e3 * row['low']:,.1f} to {1e3 * row['high']:,.1f} "
            f"| {numbers[0]} | {numbers[1]} | {row['extra_bytes'] / 2**20:,.0f} MiB |"
        )
    reasons = {
        f"{name}: {reason}" for skipped in content.get("skipped", {}).values() for name, reason in skipped.items()
    }
    return [*lines, *(["", "Not run: " + "; ".join(sorted(reasons)) + "."] if reasons else [])]


def picture(name: str, title: str) -> list[str]:
    """Of results/<name>.png, where there is one."""
    return ["", f"![{title}](../benchmarks/results/{name}.png)"] if (harness.RESULTS / f"{name}.png").is_file() else []


def section(title: str, name: str, write: Any) -> list[str]:
    """A section with a part for each device."""
    lines = [f"## {title}", ""]
    for device, label in DEVICES.items():
        content = harness.load(f"{name}-{device}")
        lines += [f"### {label}", ""]
        if content is None:
            lines += [NOT_MEASURED, ""]
        else:
            lines += [environment(content), *picture(f"{name}-{device}", title), *write(content), ""]
    return lines


def training_step(content: dict[str, Any]) -> list[str]:
    phases = [name for name in content["rows"][0] if name not in ("variant", "step")]
    lines = [
        "",
        "16 prompts x 8 responses of 24 tokens, the tiny model of `make demo`; medians of seconds. Scoring is without "
        "weights, and update (clipping, optimizer) without the loss and its backward.", "",
        f"| | step | {' | '.join(phases)} |", f"|---|---|{'---|' * len(phases)}",
    ]  # fmt: skip
    for row in content["rows"]:
        lines.append(f"| {row['variant']} | {row['step']:.2f} | {' | '.join(f'{row[p]:.2f}' for p in phases)} |")
    return lines


def growth(content: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "Ranges start where the operators' tiles, of a fixed size, are full: below, memory grows only until they are. "
        "An exponent of memory below 1 is a fixed tile beside a result that grows.", "",
        "| operator | against | with | exponent of time | of memory | most memory |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for fit in content["fits"]:
        rows = [row for row in content["rows"] if (row["op"], row["axis"]) == (fit["op"], fit["axis"])]
        most = max(row["extra_bytes"] for row in rows) / 2**20
        lines.append(
            f"| {fit['op']} | {fit['axis']} | {fit['fixed']}{other_commit(content, rows[0])} | {fit['seconds']:.2f} "
            f"| {fit['extra_bytes']:.2f} | {most:.1f} MiB |"
        )
    return lines


TASKS = {
    "learning": "One moment of the clip decides the question, whatever a response says.",
    "learning-cue": "What a response wrote decides where it looks next: right and wrong ones look at different frames.",
    "learning-presets": "Other methods' presets (docs/own_method.md), on the clips of the first table.",
}
# Of training: shares of frames and of tokens, means over steps.
SELECTION = {
    "frames/empty": "no frame picked", "frames/precision": "picked frames that decide",
    "frames/recall": "deciding frames picked", "weight/share": "tokens with W > 1",
}  # fmt: skip


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def learning() -> list[str]:
    lines = ["## Does it learn better?", ""]
    for name, task in TASKS.items():
        content = harness.load(name)
        lines += [f"### {task}", ""]
        if content is None:
            lines += [f"{NOT_MEASURED} `make bench-learning` does, in about half an hour a task on two cores.", ""]
            continue
        rows = content["rows"]
        lines += [environment(content), *picture(name, "differences to GRPO"), ""]
        lines.append(
            f"Accuracy in percent, held out after {content['steps']} steps and of all responses sampled in training, "
            f"means of {rows[0]['seeds']} seeds; in brackets the difference to GRPO of the same seed, in points, with "
            f"the 95% interval of its mean. Runs of commit {', '.join(content['commits'])}."
        )
        lines += ["", "| | validation | ood | training |", "|---|---|---|---|"]
        for row in rows:
            cells = [
                f"{100 * row[name]:.1f} ({100 * row[f'{name}-grpo']:+.1f} ± {100 * row[f'{name} 95%']:.1f})"
                for name in ("validation", "ood", "training")
            ]
            lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
        lines += ["", "What was picked while training:", ""]
        lines += [f"| | {' | '.join(SELECTION.values())} |", f"|---|{'---|' * len(SELECTION)}"]
        for row in rows:
            if row["weight/share"] is not None:
                lines.append(f"| {row['variant']} | {' | '.join(share(row[key]) for key in SELECTION)} |")
        lines += [
            "", "Where responses of the warm starts look: the share that has a deciding frame among its most attended "
            "ones, and what the difference of sets (`hard`) makes of it.", "",
            "| warm start | groups | right | wrong | `hard` picks none | its frames that decide | of all frames |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        names = ("right", "wrong", "hard-empty", "hard-precision", "chance")
        for look in content["looks"]:
            cells = [share(look.get(key)) for key in names]
            lines.append(f"| {look['warm start']} | {look['groups']} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def plans() -> list[str]:
    lines = [
        "### Planned, not measured",
        "",
        "16 frames x 64 tokens, 8 responses of 384 tokens behind one prompt, gradient checkpointing, 32,768 tokens",
        "sampled at a time (72B: by another engine):",
    ]
    lines += [
        "",
        "| model | GPUs | prompts a step | peak of a GPU | PFLOP of a step, all GPUs |",
        "|---|---|---|---|---|",
    ]
    for model, gpus in (("Qwen2.5-VL-3B", 1), ("Qwen2.5-VL-7B", 8), ("Qwen2.5-VL-72B", 64)):
        own = model != "Qwen2.5-VL-72B"  # which is too large to be whole on a GPU
        work = Workload(
            gpus=gpus,
            prompts=max(16, gpus),
            checkpointing=True,
            share_prompt=True,
            own_rollout=own,
            rollout_tokens=32768,
        )
        plan = Plan(ARCHITECTURES[model], work)
        work = gpus * sum(plan.flop().values()) / 1e15
        lines.append(f"| {model} | {gpus} | {plan.work.prompts} | {plan.peak() / GIB:.1f} GiB | {work:,.1f} |")
    return [*lines, ""]


def text() -> str:
    lines = [INTRODUCTION]
    lines += section("Operators", "operators", contest)
    lines += section("A group behind one prompt", "group-attention", contest)
    lines += section("A group behind one prompt, from scoring to gradients", "group-step", contest)
    lines += section("Whole models: what recording costs", "whole-model", contest)
    lines += section("A training step: where the time goes", "training-step", training_step)
    lines += section("Growth", "growth", growth)
    return "\n".join([*lines, *learning(), *credit.section(), COST_MODEL, *plans()]).rstrip() + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text())
    print(PAGE)


if __name__ == "__main__":
    main()
