"""Tables and tests of the credit measurement from its raw results: python -m benchmarks.credit.results [--study ...]

Reads results/credit-STUDY.npz and .json, which `python -m benchmarks.credit.measure` writes, and nothing else; writes
results/credit-STUDY.csv, a row for each weighting and reference, and -tests.csv, the registered hypotheses. The
analysis is that of benchmarks/credit/PREREGISTRATION.md.
"""

import argparse
import json
from typing import Any

from appo.credit import report
from appo.credit.blocks import REFERENCES, Blocks, load_blocks
from benchmarks import harness
from benchmarks.credit.studies import MAIN, STUDIES, Study

DRAWS = 10_000
PRIMARY = "only-told"  # the reference of the primary outcome


def analyse(models: list[Blocks], study: Study, draws: int = DRAWS) -> dict[str, dict[str, Any]]:
    """reference: of `appo.credit.report.compare`; the study's hypotheses are tests of the primary one."""
    return {
        reference: report.compare(
            models, reference=reference, draws=draws, pairs=study.hypotheses if reference == PRIMARY else None
        )
        for reference in REFERENCES
        if reference in models[0].names
    }


def rows_of(found: dict[str, dict[str, Any]], hits: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each reference and weighting."""
    rows = []
    for reference, result in found.items():
        for name, values in result["rows"].items():
            row: dict[str, Any] = {"reference": reference, "weights": name}
            for key in ("cosine", "difference", "samples", "bias"):
                row |= {key: values[key]["value"], f"{key} low": values[key]["low"], f"{key} high": values[key]["high"]}
            rows.append(row | {key: hits.get(name, {}).get(key) for key in ("precision", "recall", "auc")})
    return rows


def tests_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each hypothesis."""
    return [
        {"hypothesis": number, "row": test["rows"][0], "against": test["rows"][1]}
        | {"difference": test["value"]} | {key: test[key] for key in ("low", "high", "p", "p_holm", "undefined")}
        for number, test in result["tests"].items()
    ]  # fmt: skip


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """To five digits, for a table that is committed."""
    return [{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), default=MAIN)
    parser.add_argument("--name", help="of the result files (default: credit-STUDY)")
    parser.add_argument("--draws", type=int, default=DRAWS, help="bootstrap draws")
    options = parser.parse_args()
    path = harness.RESULTS / f"{options.name or f'credit-{options.study}'}.npz"
    content = json.loads(path.with_suffix(".json").read_text())
    models = load_blocks(path)
    study = STUDIES[options.study]
    found = analyse(list(models.values()), study, options.draws)
    rows, tests = rows_of(found, content["hits"]), tests_of(found[PRIMARY])
    harness.write_csv(path.with_suffix(".csv"), rounded(rows))
    harness.write_csv(path.with_name(f"{path.stem}-tests.csv"), rounded(tests))
    counts = {seed: int(model.sizes.sum()) for seed, model in models.items()}
    print(f"groups: {counts}; registered: {study.groups} each")
    print(*report.table(found[PRIMARY], content["hits"]), sep="\n")
    for test in tests:
        print("{hypothesis:>3s} {row} - {against}: {difference:+.3f} [{low:+.3f}, {high:+.3f}], "
              "p {p:.4f}, Holm {p_holm:.4f}".format(**test))  # fmt: skip


if __name__ == "__main__":
    main()
