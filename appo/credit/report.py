"""From units to a table: how each weighting's gradient points, against W = 1 on the same responses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from appo.credit.blocks import Blocks
from appo.credit.collect import Unit
from appo.credit.gradients import HitCounts
from appo.credit.u_statistics import (
    Array,
    batch_cosine,
    estimate,
    holm,
    pair_means,
    resamples,
    samples_ratio,
)
from appo.credit.weightings import BASE

DRAWS = 2000
BATCH = 16


def compare(
    models: Sequence[Blocks],
    *,
    reference: str,
    base: str = BASE,
    batch: float = BATCH,
    draws: int = DRAWS,
    pairs: Mapping[str, tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Each row's batch cosine with the mean gradient of the row ``reference``, and its difference to ``base``'s.

    models: inner products of each model are averaged, every model counting alike; its blocks are what is resampled.
    pairs: named differences (row, row) beside those to ``base``, whose p-values are corrected together.

    Raises ValueError for fewer than two blocks of a model.
    """
    sizes = [int(model.sizes.sum()) for model in models]
    if min(len(model.sizes) for model in models) < 2:
        raise ValueError(f"compare: expected at least two blocks of each model, got {[len(m.sizes) for m in models]}.")
    counts = resamples([len(model.sizes) for model in models], draws)
    cosines, biases = {}, {}
    for name in models[0].names:
        strata = [model.products(name, reference) for model in models]
        cosines[name] = batch_cosine(strata, counts, batch)
        biases[name] = batch_cosine(strata, counts, np.inf)
    rows = {
        name: {
            "cosine": estimate(cosine)._asdict(),
            "difference": estimate(cosine - cosines[base])._asdict(),
            "samples": estimate(samples_ratio(cosine, cosines[base]))._asdict(),
            "bias": estimate(biases[name])._asdict(),
        }
        for name, cosine in cosines.items()
    }
    tests = {}
    for name, (one, other) in (pairs or {}).items():
        if one in cosines and other in cosines:
            tests[name] = estimate(cosines[one] - cosines[other])._asdict() | {"rows": [one, other]}
    for name, p in holm({name: test["p"] for name, test in tests.items()}).items():
        tests[name]["p_holm"] = p
    return {
        "reference": reference, "base": base, "batch": batch, "draws": draws,
        "groups": sizes, "rows": rows, "tests": tests,
    }  # fmt: skip


def noise(models: Sequence[Blocks]) -> dict[str, dict[str, float]]:
    """For each row: "signal", |E g|^2, and "noise", tr Var g of a group; mean over models."""
    found = {}
    for name in models[0].names:
        values = []
        for model in models:
            square, own = model.pairs[name, name], model.self_products[name, name]
            signal = float(pair_means(square, np.ones((1, len(square))), model.sizes, own)[0])
            values.append((signal, float(own.sum() / model.sizes.sum()) - signal))
        found[name] = dict(zip(("signal", "noise"), np.mean(values, 0).tolist(), strict=True))
    return found


def hits(models: Sequence[Sequence[Unit]]) -> dict[str, dict[str, float]]:
    """For each row with weights of its own: precision (bonus on evidence tokens over all bonus), recall (evidence
    tokens that weigh more than their response's mean) and AUC, over all groups of all models."""
    counts: dict[str, Array] = {}
    aucs: dict[str, list[float]] = {}
    for unit in (unit for units in models for unit in units):
        for name, values in unit.hits.items():
            counts[name] = counts.get(name, np.zeros(len(HitCounts._fields))) + np.array(values)
            aucs.setdefault(name, []).extend(unit.aucs.get(name, []))
    return {
        name: {
            "precision": float(count.evidence_bonus / count.bonus) if count.bonus else float("nan"),
            "recall": float(count.above_mean / count.evidence) if count.evidence else float("nan"),
            "auc": float(np.mean(aucs[name])) if aucs[name] else float("nan"),
        }
        for name, count in ((name, HitCounts(*values)) for name, values in counts.items())
    }


def totals(models: Sequence[Sequence[Unit]]) -> dict[str, float]:
    """Sums over all units, and "informative", the groups whose rewards differ."""
    found: dict[str, float] = {"informative": 0.0}
    for unit in (unit for units in models for unit in units):
        found["informative"] += len(unit.records)
        for name, value in unit.totals.items():
            found[name] = found.get(name, 0.0) + value
    return found


def table(result: Mapping[str, Any], found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines of Markdown. found: of `hits`."""
    lines = [
        f"| weights | cosine, {result['batch']:g} groups | less {result['base']}'s | samples x | bias alone "
        "| precision | recall | AUC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        cells = [interval(row[key]) for key in ("cosine", "difference", "samples")] + [number(row["bias"]["value"])]
        cells += [number(found.get(name, {}).get(key, float("nan"))) for key in ("precision", "recall", "auc")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def interval(value: Mapping[str, float]) -> str:
    if not np.isfinite(value["value"]):
        return "-"
    return f"{value['value']:.3f} [{number(value['low'])}, {number(value['high'])}]"


def number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "-"
