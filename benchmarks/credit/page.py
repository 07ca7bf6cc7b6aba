"""The section of docs/performance.md on credit, from results/credit-STUDY.json, .csv and -tests.csv."""

import csv
import json
from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from benchmarks.credit.results import PRIMARY
from benchmarks.credit.studies import FRAMES, MAIN, STUDIES, Study

COMMAND = "python -m benchmarks.credit.measure"


def read(name: str) -> list[dict[str, str]]:
    with (harness.RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def signed(row: dict[str, str], name: str, low: str, high: str) -> str:
    if row[name] in ("", "nan"):
        return ""
    return f"{float(row[name]):+.3f} [{float(row[low]):+.3f}, {float(row[high]):+.3f}]"


def plain(row: dict[str, str], name: str, form: str = ".2f") -> str:
    return "" if row[name] in ("", "nan") else f"{float(row[name]):{form}}"


def groups(content: dict[str, Any]) -> dict[str, int]:
    """Groups with a gradient of each warm start."""
    return {seed: int(values["informative"]) for seed, values in content["totals"].items()}


def finished(content: dict[str, Any], study: Study) -> bool:
    """Whether the stopping rule of the pre-registration was reached."""
    counts = groups(content)
    return all(counts.get(str(seed), 0) >= study.groups for seed in study.seeds)


def starts(count: int) -> str:
    return f"{count} warm start{'s' * (count != 1)}"


def study_lines(title: str) -> list[str]:
    study, name = STUDIES[title], f"credit-{title}"
    content = json.loads((harness.RESULTS / f"{name}.json").read_text())
    rows = {(row["reference"], row["weights"]): row for row in read(f"{name}.csv")}
    counts, warm = groups(content), content["warm_starts"]
    state = (
        f"{sum(counts.values()):,} groups of {starts(len(counts))} ("
        + "; ".join(
            f"seed {seed}: {count} groups, {warm[seed]['lacking']:.1%} of responses without the telling sentence, "
            f"accuracy {warm[seed]['accuracy']:.2f}" for seed, count in counts.items()
        ) + ")."
    )  # fmt: skip
    if not finished(content, study):
        of = starts(len(study.seeds))
        state = f"**Preliminary: the registered {study.groups} groups of each of {of} were not reached.** {state}"
    lines = [
        f"### {title}: {study.about}", "", state, "",
        "*Cosine*: of the gradient of 16 groups with the mean gradient of the evidence tokens (words that tell what "
        "was seen), less that of W = 1; the next column with the mean gradient under W = 1 as reference. *Samples "
        "x*: how many times the samples W = 1 needs for the same cosine. *Precision*: share of the bonus on "
        "evidence tokens; *recall*: share of these that weigh more than their response's mean; *AUC*: 0.5 is "
        "chance. 95 % bootstrap intervals over units.", "",
        "| weights | cosine | less W = 1's | the same, reference W = 1 | samples x | precision | recall | AUC |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (reference, weights), row in rows.items():
        if reference != PRIMARY:
            continue
        cells = [plain(row, "cosine", ".3f"), signed(row, "difference", "difference low", "difference high")]
        cells.append(signed(rows["grpo", weights], "difference", "difference low", "difference high"))
        cells += [plain(row, key) for key in ("samples", "precision", "recall", "auc")]
        lines.append(f"| {weights} | {' | '.join(cells)} |")
    lines += ["", "| hypothesis | difference of cosines | p | p, Holm |", "|---|---|---|---|"]
    for test in read(f"{name}-tests.csv"):
        value = signed(test, "difference", "low", "high")
        cells = [value, plain(test, "p", ".4f"), plain(test, "p_holm", ".4f")]
        lines.append(f"| {test['hypothesis']}: {test['row']} against {test['against']} | {' | '.join(cells)} |")
    return [*lines, ""]


def gains(name: str, rows: Sequence[str]) -> tuple[list[str], str]:
    """Of a study: "samples x" of each row with its interval, and how many groups it has."""
    content, study = json.loads((harness.RESULTS / f"credit-{name}.json").read_text()), STUDIES[name]
    table = {row["weights"]: row for row in read(f"credit-{name}.csv") if row["reference"] == PRIMARY}
    found = []
    for row in rows:
        value, low, high = (float(table[row][key]) for key in ("samples", "samples low", "samples high"))
        found.append(f"{value:.2g} [{low:.2g}, {high:.2g}]")
    counts = groups(content)
    done = f"{sum(counts.values()):,} groups of {starts(len(counts))}"
    if not finished(content, study):
        done += f", preliminary: {len(study.seeds) * study.groups:,} of {len(study.seeds)} are registered"
    return found, done


def sentence() -> str:
    """README's words on the two registered studies of the primary task, from their results."""
    rows = ("oracle", "hard", "all", "together", "together-true-frames")
    (oracle, hard, every, ours, given), done = gains(MAIN, rows)
    text = (
        "**Does looking help?** A weight W of each token multiplies its term of the loss; W = 1 is GRPO. Where 48 "
        "filler words surround those that tell what was seen, how many times the samples does W = 1 need for as good a "
        f"gradient of these? W = 2.7 on exactly these: {oracle}; APPO's weights with its own choice of frames "
        f"(`hard`): {hard}, with that of all responses (`all`): {every} (below 1: worse than W = 1); our variant "
        f"(`together`): {ours}; the same, given the frames that decide: {given} ({done})"
    )
    if (harness.RESULTS / f"credit-{FRAMES}-tests.csv").is_file():
        (peak, blind), fresh = gains(FRAMES, ("peak-together", "middle-entropy"))
        text += (
            "; our variant with the frame that a few tokens look at far more than their response usually does "
            "(`strategy: peak`, one frame): "
            f"{peak}; by entropy, without a look (`middle-entropy`): {blind} ({fresh}, other prompts)"
        )
    return text + "; 95 % intervals; `python -m benchmarks.credit.results`, [docs/credit.md](docs/credit.md)."


def section() -> list[str]:
    """Lines of Markdown; what has not been measured is said to be missing."""
    lines = [
        "## Credit: which token weights point the gradient better?", "",
        "Theory, measures and rows: docs/credit.md; what was decided before: `benchmarks/credit/PREREGISTRATION.md`. "
        f"`{COMMAND}` measures, `python -m benchmarks.credit.results` makes these tables of its raw results.", "",
    ]  # fmt: skip
    measured = [name for name in STUDIES if (harness.RESULTS / f"credit-{name}-tests.csv").is_file()]
    if not measured:
        return [*lines, "Not measured yet.", ""]
    return lines + [line for name in measured for line in study_lines(name)]
