"""From units to the page: raw results, tables, tests, what is said of a measurement that is not finished."""

import csv
import json
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from appo.credit.blocks import blocks, load_blocks
from appo.credit.collect import Unit, save_unit, unit_path
from appo.credit.report import compare
from appo.credit.weightings import BASE, WEIGHTINGS
from benchmarks import harness
from benchmarks.credit import frames, measure, page, results
from benchmarks.credit.studies import FIRST_ROWS, FRAMES, MAIN, STUDIES

NAMES = [name for name in FIRST_ROWS if WEIGHTINGS[name].make]


def unit(generator: torch.Generator, groups: int, names: Sequence[str] = NAMES) -> Unit:
    """Telling words with a signal along the first axis, everything else with noise on top; `together` like the rest."""
    told = torch.randn(groups, 1, 64, generator=generator) / 8
    told[..., 0] += 1.0
    noise = torch.randn(groups, 1, 64, generator=generator)
    own = 0.1 * torch.randn(groups, len(names), 64, generator=generator)
    sketches = told + noise + own
    sketches[:, names.index("only-told")] = told[:, 0]
    hits = {"together": [1.0, 4.0, 1.0, 2.0]}
    totals = {"groups": 16.0, "responses": 128.0, "telling": 127.0, "accuracy": 64.0, "tokens": 8000.0, "cpu": 24.0}
    return Unit(list(names), sketches, ["r"] * groups, {}, hits, {"together": [0.25]}, totals)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Raw results of two warm starts with three units each, as the command writes them."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    generator, folders = torch.Generator().manual_seed(0), {}
    for seed in (300, 301):
        folders[seed] = tmp_path / f"start-{seed}"
        folders[seed].mkdir()
        for number in range(3):
            save_unit(unit(generator, 16 - number), unit_path(folders[seed], number))
    checks = {key: {"responses": 512, "lacking": 0.01, "accuracy": 0.5} for key in folders}
    measure.write(folders, checks, STUDIES[MAIN], 1000, "credit-verbose-48x4")
    monkeypatch.setattr(sys, "argv", ["results", "--draws", "200"])
    results.main()
    return tmp_path


def test_tables_are_those_of_the_units(folder):
    """The raw file alone gives what the units give, and groups one by one the same values."""
    models = load_blocks(folder / "credit-verbose-48x4.npz")
    assert [model.sizes.tolist() for model in models.values()] == [[16, 15, 14]] * 2
    units = [list(measure.units_of(folder / f"start-{seed}")) for seed in (300, 301)]
    by_group = compare([blocks(each) for each in units], reference="only-told", draws=2)
    with (folder / "credit-verbose-48x4.csv").open() as file:
        rows = {(row["reference"], row["weights"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(reference, name) for reference in results.REFERENCES for name in FIRST_ROWS}
    for name in FIRST_ROWS:
        value = by_group["rows"][name]["cosine"]["value"]
        assert float(rows["only-told", name]["cosine"]) == pytest.approx(value, rel=1e-3), name
    oracle = rows["only-told", "oracle"]
    assert float(oracle["difference low"]) > 0 and float(oracle["samples"]) > 1


def test_hypotheses_are_corrected_together(folder):
    with (folder / "credit-verbose-48x4-tests.csv").open() as file:
        tests = list(csv.DictReader(file))
    assert [test["hypothesis"] for test in tests] == [str(number) for number in range(15)]
    assert all(float(test["p_holm"]) >= float(test["p"]) for test in tests)
    named = {name for test in tests for name in (test["row"], test["against"])}
    assert named <= set(WEIGHTINGS) and tests[0]["row"] == "oracle" and tests[0]["against"] == BASE


def test_the_page_says_what_is_there_and_what_is_missing(folder):
    text = "\n".join(page.section())
    assert "**Preliminary: the registered 1000 groups of each of 3 warm starts were not reached.**" in text
    assert "90 groups of 2 warm starts (seed 300: 45 groups, 1.0% of responses" in text
    assert "| 0: oracle against grpo | +" in text and "0.25 | 0.50 | 0.25 |" in text
    sentence = page.sentence()
    assert "90 groups of 2 warm starts, preliminary: 3,000 of 3 are registered" in sentence
    content = json.loads((folder / "credit-verbose-48x4.json").read_text())
    for seed in ("300", "301", "302"):
        content["totals"][seed] = content["totals"]["300"] | {"informative": 1003.0}
        content["warm_starts"][seed] = content["warm_starts"]["300"]
    (folder / "credit-verbose-48x4.json").write_text(json.dumps(content))
    assert "reliminary" not in "\n".join(page.section()) + page.sentence()
    (folder / "credit-verbose-48x4-tests.csv").unlink()
    assert "Not measured yet." in page.section()


def test_a_study_of_some_rows_has_its_own_tables_and_its_part_of_the_sentence(folder, monkeypatch):
    """The second registration: no row "sentence", so that this reference is left out; hypotheses of its own."""
    study = STUDIES[FRAMES]
    made = [name for name in study.rows if WEIGHTINGS[name].make]
    folders = {seed: folder / f"frames-{seed}" for seed in study.seeds}
    for seed, each in folders.items():
        each.mkdir()
        for number in range(2):
            save_unit(unit(torch.Generator().manual_seed(seed + number), 16, made), unit_path(each, number))
    checks = {seed: {"responses": 512, "lacking": 0.01, "accuracy": 0.5} for seed in folders}
    assert "`strategy: peak`" not in page.sentence()
    measure.write(folders, checks, study, study.groups, f"credit-{FRAMES}")
    monkeypatch.setattr(sys, "argv", ["results", "--study", FRAMES, "--draws", "100"])
    results.main()
    with (folder / "credit-frames.csv").open() as file:
        rows = {(row["reference"], row["weights"]) for row in csv.DictReader(file)}
    assert rows == {(reference, name) for reference in ("only-told", BASE) for name in study.rows}
    with (folder / "credit-frames-tests.csv").open() as file:
        assert [test["hypothesis"] for test in csv.DictReader(file)] == list(study.hypotheses)
    assert "(96 groups of 3 warm starts, preliminary: 900 of 3 are registered, other prompts)" in page.sentence()
    assert "### frames: a choice of frames" in "\n".join(page.section())


def test_studies_name_rows_that_are_there_and_prompts_that_no_other_study_has():
    for study in STUDIES.values():
        assert {"grpo", "only-told"} <= set(study.rows) <= set(WEIGHTINGS)
        assert {row for pair in study.hypotheses.values() for row in pair} <= set(study.rows)
    first = STUDIES[MAIN]
    assert 16 * STUDIES[FRAMES].first > 1.05 * first.groups and first.seeds == STUDIES[FRAMES].seeds
    assert 16 * STUDIES[FRAMES].first + 1.05 * STUDIES[FRAMES].groups < measure.CLIPS["train"]


def test_quality_of_a_choice_of_frames_by_hand():
    """Two responses look at frame 0 all along, one token of each at frame 2; labelled are 1 and 2."""
    mass = torch.tensor([[[0.5, 0.01, 0.02], [0.3, 0.01, 0.2]]]).repeat(2, 1, 1)
    prompt = SimpleNamespace(labelled_frames=lambda: [1, 2], num_frames=3)
    group = SimpleNamespace(
        mass=mass, mask=torch.ones(2, 2).bool(), accuracy=torch.tensor([1.0, 0.0]), prompt=prompt
    )  # fmt: skip
    assert frames.quality([group], "common", 1, 1) == {"precision": 0.0, "recall": 0.0, "none": 0.0}
    assert frames.quality([group], "peak", 1, 1) == {"precision": 1.0, "recall": 0.5, "none": 0.0}
    hard = frames.quality([group, group], "hard", 1, 1)
    assert hard["none"] == 1.0 and hard["recall"] == 0.0 and hard["precision"] != hard["precision"]


def test_a_unit_of_another_measurement_stops_it(folder):
    generator = torch.Generator().manual_seed(1)
    other = unit(generator, 3)
    other.key = {"settings": "other"}
    save_unit(other, unit_path(folder / "start-300", 3))
    with pytest.raises(ValueError, match="of another measurement"):
        list(measure.units_of(folder / "start-300", {"settings": "this"}))
    assert np.isfinite(blocks(measure.units_of(folder / "start-300"), whole=True).sizes).all()


@pytest.mark.slow
def test_a_warm_start_tells_what_it_saw(tmp_path, monkeypatch):
    """Five minutes: of the responses of a verbose warm start, fewer than 2 % lack the sentence, and groups differ."""
    monkeypatch.setattr(measure, "CLIPS", {"warmup": 512, "train": measure.CHECKED})
    start = measure.prepare(tmp_path, "verbose-48x4", 301)
    found = measure.check(measure.trainer_of(start), start)
    assert found["lacking"] < measure.MOST_LACKING
    assert 0.4 < found["accuracy"] < 0.7 and found["informative"] > 0.8
