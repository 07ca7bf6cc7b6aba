"""From units to a table: how each weighting's gradient points, against W = 1 on the same responses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from appo.credit.collect import Unit
from appo.credit.u_statistics import (
    Array,
    Products,
    batch_cosine,
    estimate,
    holm,
    pair_means,
    resamples,
    samples_ratio,
)
from appo.credit.weightings import BASE, WEIGHTINGS, Weighting

DRAWS = 2000
BATCH = 16


def gradients(units: Sequence[Unit], weightings: Mapping[str, Weighting] = WEIGHTINGS) -> dict[str, Array]:
    """name: (n, size) of every row of one model's units, those that are sums of others included."""
    names = units[0].names
    stacked = torch.cat([unit.sketches for unit in units]).numpy()
    found = {name: stacked[:, index] for index, name in enumerate(names)}
    for name, row in weightings.items():
        if row.sum_of and all(part in found for part in row.sum_of):
            found[name] = np.sum([factor * found[part] for part, factor in row.sum_of.items()], axis=0)
    return found


def compare(
    models: Sequence[Sequence[Unit]],
    *,
    reference: str,
    base: str = BASE,
    batch: float = BATCH,
    draws: int = DRAWS,
    weightings: Mapping[str, Weighting] = WEIGHTINGS,
    pairs: Mapping[str, tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Each row's batch cosine with the mean gradient of the row ``reference``, and its difference to ``base``'s.

    models: the units of each model; their inner products are averaged, every model counting alike. pairs: named
    differences (row, row) beside those to ``base``, whose p-values are corrected together.
    """
    found = [gradients(units, weightings) for units in models]
    sizes = [len(each[reference]) for each in found]
    if min(sizes) < 2:
        raise ValueError(f"compare: expected at least two groups of each model with rewards that differ, got {sizes}.")
    counts = resamples(sizes, draws)
    cosines, biases = {}, {}
    for name in found[0]:
        strata = [products(each[name], each[reference]) for each in found]
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


def products(g: Array, r: Array) -> Products:
    g, r = g.astype(np.float64), r.astype(np.float64)
    return Products(g @ g.T, g @ r.T, r @ r.T)


def noise(models: Sequence[Sequence[Unit]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each row: "signal", |E g|^2, and "noise", tr Var g of a group; mean over models."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for units in models:
        found = gradients(units)
        for name in names:
            if name in found:
                gram = products(found[name], found[name]).gg
                signal = float(pair_means(gram, np.ones((1, len(gram))))[0])
                rows.setdefault(name, []).append((signal, float(np.diag(gram).mean()) - signal))
    return {
        name: dict(zip(("signal", "noise"), np.mean(values, 0).tolist(), strict=True)) for name, values in rows.items()
    }


def hits(models: Sequence[Sequence[Unit]]) -> dict[str, dict[str, float]]:
    """For each row with weights of its own: precision (bonus on telling tokens over all bonus), recall (telling tokens
    that weigh more than their response's mean) and AUC, over all groups of all models."""
    counts: dict[str, Array] = {}
    aucs: dict[str, list[float]] = {}
    for unit in (unit for units in models for unit in units):
        for name, values in unit.hits.items():
            counts[name] = counts.get(name, np.zeros(4)) + np.array(values)
            aucs.setdefault(name, []).extend(unit.aucs.get(name, []))
    return {
        name: {
            "precision": float(on / total) if total else float("nan"),
            "recall": float(above / told) if told else float("nan"),
            "auc": float(np.mean(aucs[name])) if aucs[name] else float("nan"),
        }
        for name, (on, total, above, told) in counts.items()
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
