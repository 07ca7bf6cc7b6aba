"""Measuring a run's model, one batch of prompts after the other, each written when it is done."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appo.config import APPOConfig, ConfigError
from appo.credit.evidence import Evidence, FindSpans, find_evidence
from appo.credit.gradients import HitCounts, evidence_aucs, group_gradients, hit_counts, trained_parameters
from appo.credit.sketch import CountSketch
from appo.credit.weightings import WEIGHTINGS, Divergences, ScoredGroup, Weighting
from appo.train.groups import Group, whole_groups
from appo.train.rules import Divergence
from appo.train.trainer import Trainer
from appo_kernels import group_divergence

VERSION = 1  # of what a unit holds


@dataclass
class Unit:
    """Measurements of one batch of prompts, of whose groups n have rewards that differ.

    sketches: (n, rows, size) fp32, of the weightings in ``names``. records: ids of the n. key: what has to be equal for
    units to be of one measurement. hits, aucs: by weighting, the numbers of `HitCounts` summed over
    groups, and the AUCs. totals: "groups", "responses", "telling" (with evidence), "accuracy" (sum over responses),
    "tokens", and "cpu" in seconds.
    """

    names: list[str]
    sketches: Tensor
    records: list[str]
    key: dict[str, Any]
    hits: dict[str, list[float]] = field(default_factory=dict)
    aucs: dict[str, list[float]] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)


class Collector:
    """Measures batches of a trainer's prompts.

    Args:
        trainer: of the run; nothing of it is trained. One process, weights whole.
        find: the places of the evidence in a response's text; None: not known, and no row needs them.
        weightings: rows of the comparison.
        size: of the sketches.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        find: FindSpans | None = None,
        weightings: Mapping[str, Weighting] = WEIGHTINGS,
        size: int = 8192,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if trainer.accelerator.num_processes > 1:
            raise ConfigError("credit: expected one process, got several. Run it without a launcher, on one GPU.")
        self.trainer, self.find, self.size = trainer, find, size
        self.weightings = {name: row for name, row in weightings.items() if find is not None or not row.evidence}
        self.sketch = CountSketch(trained_parameters(trainer), size=size)
        self.key = {"version": VERSION, "size": size, "rows": list(self.weightings)} | dict(identity or {})

    def unit(self, number: int) -> Unit:
        """Batch ``number`` of the order of prompts, from 0; by the run's settings and weights alone."""
        trainer, started = self.trainer, time.process_time()
        trainer.sampler.load_state_dict([])
        trainer.sampler.take(number * trainer.config.prompts_per_step)
        trainer.policy.eval()
        groups = trainer.reward(trainer.rollout(trainer.config.prompts_per_step))
        found = Unit([name for name, row in self.weightings.items() if row.make], torch.empty(0), [], self.key)
        found.totals = dict.fromkeys(("groups", "responses", "telling", "accuracy", "tokens"), 0.0)
        sketches = []
        for group in groups:
            evidence = None if self.find is None else find_evidence(group, trainer.processor.tokenizer, self.find)
            found.totals["groups"] += 1
            found.totals["responses"] += len(group.mask)
            found.totals["accuracy"] += float(group.accuracy.sum())
            found.totals["tokens"] += group.tokens
            found.totals["telling"] += 0 if evidence is None else float(evidence.present.sum())
            if group.informative:
                found.records.append(group.prompt.record.id)
                sketches.append(self._measure(group, evidence, found))
        rows = len(found.names)
        found.sketches = torch.stack(sketches) if sketches else torch.empty(0, rows, self.size)
        found.totals["cpu"] = time.process_time() - started
        return found

    def _measure(self, group: Group, evidence: Evidence | None, found: Unit) -> Tensor:
        trainer = self.trainer
        trainer.score(whole_groups([group]))
        if not group.scored:
            raise ConfigError(f"credit: {group.prompt.record.place}: log-probabilities that are not finite.")
        trainer.advantage([group])
        weights = self.weights(group, evidence)
        for name, weight in weights.items():
            if evidence is not None and bool((weight[group.mask] != weight[group.mask][0]).any()):
                hits = hit_counts(weight, group.mask, evidence.tokens)
                before = found.hits.get(name, [0.0] * len(HitCounts._fields))
                found.hits[name] = [a + b for a, b in zip(before, hits, strict=True)]
                found.aucs.setdefault(name, []).extend(evidence_aucs(weight, group.mask, evidence.tokens))
        return torch.stack([*group_gradients(trainer, group, weights, self.sketch).values()])

    @torch.no_grad()
    def weights(self, group: Group, evidence: Evidence | None) -> dict[str, Tensor]:
        """name: weights (G, N) fp32, 0 at padding, of every row that has its own.

        As in training, W = 1 where a row has nothing to go by: no video, or no labelled frames.
        """
        trainer, found = self.trainer, {}
        hidden, lse = group.hidden, group.lse

        def make() -> None:
            weight, bias = trainer.unwrapped.output_head(torch.float32 if hidden is None else hidden.dtype)
            scored = ScoredGroup(group, _divergences(hidden, lse, weight, bias, trainer), trainer.config, evidence)
            for name, row in self.weightings.items():
                if row.make is None:
                    continue
                known = (hidden is not None or not row.looks) and (scored.labelled_frames or not row.labels)
                made = row.make(scored) if known else torch.ones(group.mask.shape)
                found[name] = made.float() * group.mask

        with trainer.autocast():
            trainer.unwrapped.run(make)
        group.hidden = group.lse = None
        return found


def _divergences(
    hidden: Tensor | None, lse: Tensor | None, weight: Tensor, bias: Tensor | None, trainer: Trainer
) -> Divergences:
    logits = trainer.unwrapped.logit_arguments(trainer.config)

    def of(config: APPOConfig) -> Divergence:
        assert hidden is not None and lse is not None
        settings: dict[str, Any] = {"kind": config.divergence, "bias": bias} | logits
        return lambda slots: group_divergence(hidden, weight, lse, slots.to(hidden.device), **settings).cpu()

    return of


def unit_path(folder: Path, number: int) -> Path:
    return folder / f"unit-{number:05d}.pt"


def save_unit(unit: Unit, path: Path) -> None:
    """Sketches are kept as 16 bits of each row's largest number; what reads them, reads the same everywhere."""
    scale = unit.sketches.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    stored = vars(unit) | {"sketches": (unit.sketches / scale).half(), "scale": scale}
    partial = path.with_suffix(".partial")
    torch.save(stored, partial)
    partial.rename(path)


def load_unit(path: Path, key: Mapping[str, Any] | None = None) -> Unit:
    """Raises ConfigError for a unit of another measurement than ``key`` says."""
    stored = torch.load(path, weights_only=True)
    stored["sketches"] = stored["sketches"].float() * stored.pop("scale")
    unit = Unit(**stored)
    for name, value in (key or {}).items():
        if unit.key.get(name) != value:
            raise ConfigError(
                f"credit: {path}: expected a unit with {name} {value!r}, got {unit.key.get(name)!r}. It is of another "
                "measurement: choose another folder."
            )
    return unit
