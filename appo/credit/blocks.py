"""Inner products of sums of gradients over blocks of groups: all that cosines and their intervals need of a model.

A block is one group, or all groups of a unit. Pairs of different groups can be counted from blocks without their
gradients: those within a block are the square of its sum less the squares of its groups.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from appo.credit.collect import Unit
from appo.credit.u_statistics import Array, Products
from appo.credit.weightings import BASE, WEIGHTINGS, Weighting

REFERENCES = ("only-told", BASE, "sentence")


@dataclass
class Blocks:
    """The blocks of one model.

    sizes: (m,) groups of each. pairs: inner products (m, m) of the blocks' sums, by (row, other row). self_products:
    (m,), the sum over the groups of a block of the inner product of the two rows' gradients.
    """

    sizes: Array
    pairs: dict[tuple[str, str], Array]
    self_products: dict[tuple[str, str], Array]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.pairs))

    def products(self, name: str, reference: str) -> Products:
        """Raises ValueError for a reference whose inner products with the row are not there."""
        if (name, reference) not in self.pairs:
            there = [other for row, other in self.pairs if row == name]
            raise ValueError(f"blocks: `reference`: expected one of {', '.join(there)}, got {reference!r}.")
        places = ((name, name), (name, reference), (reference, reference))
        gg, gr, rr = (self.pairs[place] for place in places)
        return Products(gg, gr, rr, self.sizes, tuple(self.self_products[place] for place in places))


def gradients(units: Sequence[Unit], weightings: Mapping[str, Weighting] = WEIGHTINGS) -> dict[str, Array]:
    """name: (n, size) of every row of one model's units, those that are sums of others included."""
    stacked = np.concatenate([unit.sketches.double().numpy() for unit in units])
    found = {name: stacked[:, index] for index, name in enumerate(units[0].names)}
    for name, row in weightings.items():
        if row.sum_of and all(part in found for part in row.sum_of):
            found[name] = np.sum([factor * found[part] for part, factor in row.sum_of.items()], axis=0)
    return found


def blocks(
    units: Iterable[Unit],
    *,
    whole: bool = False,
    references: Sequence[str] = REFERENCES,
    weightings: Mapping[str, Weighting] = WEIGHTINGS,
) -> Blocks:
    """The blocks of one model's units, which are read one after another. whole: a unit is a block, else each group is.

    Raises ValueError where no unit has a group.
    """
    sizes: list[float] = []
    sums: dict[str, list[Array]] = {}
    self_products: dict[tuple[str, str], list[Array]] = {}
    for unit in units:
        if not unit.records:
            continue
        found = gradients([unit], weightings)
        sizes += [float(len(unit.records))] if whole else [1.0] * len(unit.records)
        known = [name for name in references if name in found]
        for name, each in found.items():
            sums.setdefault(name, []).append(each.sum(0, keepdims=True) if whole else each)
            for other in dict.fromkeys([name, *known]):
                products = (each * found[other]).sum(1)
                own = self_products.setdefault((name, other), [])
                own.append(products.sum(keepdims=True) if whole else products)
    if not sizes:
        raise ValueError("blocks: `units`: expected at least one group with rewards that differ, got none.")
    stacked = {name: np.concatenate(values) for name, values in sums.items()}
    pairs = {(name, other): stacked[name] @ stacked[other].T for name, other in self_products}
    return Blocks(np.array(sizes), pairs, {place: np.concatenate(each) for place, each in self_products.items()})


def save_blocks(path: Path, models: Mapping[str, Blocks]) -> None:
    """Write blocks by their model's name as arrays of an ``.npz`` file, which `load_blocks` reads."""
    arrays: dict[str, Any] = {}
    for model, each in models.items():
        arrays[f"{model}|sizes"] = each.sizes
        for (name, other), value in each.pairs.items():
            arrays[f"{model}|{name}|{other}|pairs"] = value.astype(np.float32)
            arrays[f"{model}|{name}|{other}|same"] = each.self_products[name, other]
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.rename(path)


def load_blocks(path: Path) -> dict[str, Blocks]:
    """Blocks by their model's name, as `save_blocks` wrote them: inner products in single precision."""
    models: dict[str, Blocks] = {}
    with np.load(path) as arrays:
        for place in arrays:
            model, *rest = place.split("|")
            each = models.setdefault(model, Blocks(np.empty(0), {}, {}))
            value = arrays[place].astype(np.float64)
            if rest == ["sizes"]:
                each.sizes = value
            else:
                name, other, kind = rest
                (each.pairs if kind == "pairs" else each.self_products)[name, other] = value
    return models
