"""The measured parts of README.md, from the committed results: python -m benchmarks.readme [--write]

Prints what README says between its markers; ``--write`` puts it there. Every figure is read from benchmarks/results, so
that README and the results cannot part (`tests/test_docs.py`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.credit import page as credit

README = Path(__file__).parents[1] / "README.md"
COMMAND, END = "python -m benchmarks.readme --write", "end of the measured part"
REPLACES = {
    "frame_mass": "attention matrices, to know what each row looks at",
    "frame_attention": "attention, with the mass in the same pass",
    "token_logprobs fwd": "logits, for log-probabilities and entropy",
    "token_logprobs fwd+bwd": "the same with gradients",
    "group_divergence kl": "(G, N, V) log-probabilities",
    "logits_weighted_surrogate": "the loss of logits that are there",
    "linear_weighted_surrogate": "logits and their gradient in the loss",
    "weighted_surrogate": "the loss of log-probabilities",
    "group_attention": "a copy of the prompt for each response",
}
# Names of entries in the results, as the table says them.
SAID = {"ours, flash and frame_mass": "two passes: flash attention, then our `frame_mass`"}
# Entries that do other work than the operator beside which they were timed.
OTHER_WORK = ("flash attention alone, all rows",)

Row = dict[str, Any]


def results(name: str) -> list[Row]:
    content = harness.load(name)
    if content is None:
        raise SystemExit(f"readme: benchmarks/results/{name}.json: no such file. Run `make bench`.")
    return list(content["rows"])


def size(row: Row) -> str:
    return f"{1e3 * row['median']:,.0f} ms, {row['extra_bytes'] / 2**20:,.0f} MiB"


def compared(row: Row) -> str:
    """Name, time relative to ours (bold where it is less) and memory."""
    ratio = f"{row['to_ours']:.2f}x"
    ratio = f"**{ratio}**" if row["to_ours"] < 1 else ratio
    return f"{SAID.get(row['name'], row['name'])}: {ratio}, {row['extra_bytes'] / 2**20:,.0f} MiB"


def first_case(rows: Sequence[Row], op: str) -> list[Row]:
    """The rows of an operator's first shape in its first dtype."""
    first = next(row for row in rows if row["op"] == op)
    return [row for row in rows if all(row[key] == first[key] for key in ("op", "shape", "dtype"))]


def operator_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each operator: ours, its fastest peer, and whatever else is faster than ours."""
    lines = ["| operator | replaces | ours | fastest peer, and all that is faster than ours |", "|---|---|---|---|"]
    for op, replaces in REPLACES.items():
        ours, *others = first_case(rows, op)
        rivals = [row for row in others if row["role"] != "bound" and row["name"] not in OTHER_WORK]
        fastest = min((row for row in rivals if row["role"] == "peer"), key=lambda row: row["to_ours"])
        faster = [row for row in rivals if row["to_ours"] < 1 and row is not fastest]
        beside = "; ".join(map(compared, [fastest, *faster]))
        lines.append(f"| `{op}` | {replaces} | {size(ours)} | {beside} |")
    return lines


def other_lines() -> list[str]:
    whole = {(row["shape"], row["role"]): row for row in results("whole-model-cpu")}
    models = list(dict.fromkeys(shape for shape, _ in whole))
    ratios = ", ".join(f"{whole[model, 'ours']['ratio']:.2f} ({model})" for model in models)
    eager = whole[models[0], "peer"]["extra_bytes"] / whole[models[0], "ours"]["extra_bytes"]
    step = {row["variant"]: row for row in results("training-step-cpu")}
    growth = [
        row
        for row in results("growth-cpu")
        if (row["op"], row["axis"]) == ("linear_weighted_surrogate", "tokens")
    ]  # fmt: skip
    first, last = growth[0], growth[-1]
    losses = results("peer-losses-cpu") + results("peer-losses-verl-cpu")
    worst = {
        dtype: max(v for row in losses if row["dtype"] == dtype for n, v in row.items() if n.startswith("gradient"))
        for dtype in ("float32", "float64")
    }
    cases = sum(row["cases"] for row in losses if row["dtype"] == "float32")
    return [
        "| measured | result | command |", "|---|---|---|",
        "| gradients against the losses of TRL and verl, run from their packages: GRPO, BNPO, Dr. GRPO, DAPO, LUSPO, "
        f"CISPO, SAPO, DPPO, GPG, GSPO-token; {cases} settings, from log-probabilities, logits and hidden states "
        f"| largest relative difference {worst['float32']:.0e} in fp32, {worst['float64']:.0e} in fp64 "
        "| `python -m benchmarks.peer_losses`, `--peer verl` |",
        f"| recording 3 of 4 layers of 7B's width, against the plain forward | {ratios} of its time; eager attention "
        f"with its matrices takes {eager:.1f} times the memory | `python -m benchmarks.whole_model` |",
        f"| memory of `linear_weighted_surrogate`, {first['value'] * 8:,} and {last['value'] * 8:,} tokens, V 65,536 "
        f"| {first['extra_bytes'] / 2**20:.0f} and {last['extra_bytes'] / 2**20:.0f} MiB "
        "| `python -m benchmarks.growth` |",
        f"| scoring a step of the tiny model, prompt once per group, or with every response "
        f"| {step['APPO']['score']:.2f} s, {step['APPO, prompts not shared']['score']:.2f} s "
        "| `python -m benchmarks.training_step` |",
    ]  # fmt: skip


def parts() -> dict[str, list[str]]:
    """The lines between each pair of markers, by what the markers say after their first words."""
    environment = (harness.load("operators-cpu") or {})["environment"]
    rows = results("operators-cpu") + results("group-attention-cpu")
    attention, head, group = (
        first_case(rows, op)[0]["work"] for op in ("frame_mass", "linear_weighted_surrogate", "group_attention")
    )
    note = (
        f"*{environment['cores']} CPU cores, fp32, heads of Qwen2.5-VL-7B, cut to fit ({attention}; {head}; {group}). "
        "0.65x: the other takes 0.65 of our time; bold: it is faster than ours. `make bench` measures again.*"
    )
    return {"": [*operator_lines(rows), "", note], ": credit": [credit.sentence()], ": more": other_lines()}


def written(text: str) -> str:
    """``text`` with the measured parts renewed."""
    for name, lines in parts().items():
        begin, end = f"<!-- {COMMAND}{name} -->", f"<!-- {END}{name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = "\n".join([before + begin, *lines, end + after])
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write it into README.md")
    if parser.parse_args().write:
        README.write_text(written(README.read_text()))
    else:
        print("\n\n".join("\n".join(lines) for lines in parts().values()))


if __name__ == "__main__":
    main()
