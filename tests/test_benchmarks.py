"""The benchmarks but for their times: the guard's verdicts, statistics, fits, shapes, the page of results."""

import argparse
import json
import statistics
import sys
from dataclasses import asdict

import pytest
import torch
import training

from appo.config import APPOConfig
from appo.demo import short_name
from benchmarks import __main__ as command
from benchmarks import check, growth, harness, learning, learning_variants, page, plots, shapes


def row(name: str, role: str, median: float, spread: float = 1.05, **changes) -> dict:
    case = {"op": "frame_mass", "shape": "one", "dtype": "float32"} | changes
    return case | {
        "name": name,
        "role": role,
        "median": median,
        "low": median / spread**0.5,
        "high": median * spread**0.5,
    }


def run_of(ours: float, limit: float, peer: float, **changes) -> list[dict]:
    rows = (("ours, torch", "ours", ours), ("bound", "bound", limit), ("eager", "peer", peer))
    return [row(*one, **changes) for one in rows]


@pytest.mark.parametrize(
    ("now", "failing"),
    [
        ((1.0, 0.5, 4.0), set()),
        ((3.0, 1.5, 12.0), set()),  # a machine three times slower
        ((1.2, 0.5, 4.0), set()),  # within the tolerance of 30%
        ((0.5, 0.5, 4.0), set()),  # better is no failure
        ((1.6, 0.5, 4.0), {"bound", "eager"}),
        ((1.6, 0.5, 8.0), {"bound"}),  # the peer became slower as well
    ],
)
def test_guard_compares_ratios(now, failing):
    lines = check.compare(run_of(*now), run_of(1.0, 0.5, 4.0), 0.3)
    assert len(lines) == 2
    assert {line.split(" to ")[1].split(":")[0] for line in lines if line.startswith("FAIL")} == failing


def test_guard_allows_the_noise_of_either_run():
    then, now = run_of(1.0, 0.5, 4.0), run_of(1.6, 0.5, 4.0, spread=1.7)
    assert not any(line.startswith("FAIL") for line in check.compare(now, then, 0.3))
    assert not any(
        line.startswith("FAIL") for line in check.compare(run_of(1.6, 0.5, 4.0), run_of(1, 0.5, 4, spread=1.7), 0.3)
    )


def test_guard_compares_the_same_cases_only():
    then = run_of(1.0, 0.5, 4.0)
    assert check.compare(run_of(9.0, 0.5, 4.0, shape="other"), then, 0.3) == []
    both = run_of(1.0, 0.5, 4.0) + run_of(9.0, 0.5, 4.0, dtype="bfloat16")
    assert len(check.compare(both, then, 0.3)) == 2
    new_peer = [*run_of(1.0, 0.5, 4.0), row("newcomer", "peer", 0.1)]
    assert len(check.compare(new_peer, then, 0.3)) == 2


def test_a_failure_is_measured_again():
    """What fails twice has failed; a line that was good is not asked again."""
    runs = iter([["ok   a", "FAIL b", "FAIL c"], ["FAIL a", "ok   b", "FAIL c"]])
    assert check.confirmed(lambda: next(runs)) == ["ok   a", "ok   b", "FAIL c"]
    once = iter([["ok   a"]])
    assert check.confirmed(lambda: next(once)) == ["ok   a"]


def test_interval_is_students():
    values = [0.3, -0.1, 0.25, 0.4, 0.1, 0.0, 0.2, 0.15, 0.05, 0.3, -0.05, 0.12]
    mean, width = learning.interval(values)
    assert mean == pytest.approx(statistics.fmean(values))
    # 2.20099 is the 97.5% quantile of Student's t with 11 degrees of freedom.
    assert width == pytest.approx(2.20099 * statistics.stdev(values) / 12**0.5, rel=1e-4)
    assert learning.interval([0.5]) == (0.5, float("inf"))
    assert learning.interval([1.0] * 17)[1] == 0


def test_differences_are_paired_by_seed():
    """A gain of 0.1 in every seed is certain, however much the seeds differ."""
    results = []
    for seed in range(4):
        for variant, gain in (("grpo", 0.0), ("dapo", 0.1)):
            values = dict.fromkeys(learning.MEASURES.values(), 0.2 * seed + gain)
            results.append({"task": "moment", "variant": variant, "seed": seed, **values, "train/weight/share": 0.25})
    base, row = learning.summarise(results, ("grpo", "dapo"), 4)
    assert (base["validation-grpo"], base["validation 95%"]) == (0, 0)
    assert row["ood-grpo"] == pytest.approx(0.1) and row["ood 95%"] == pytest.approx(0, abs=1e-9)
    assert row["validation"] == pytest.approx(0.4) and row["weight/share"] == 0.25 and row["frames/empty"] is None


def weighted_group(seed: int) -> argparse.Namespace:
    """What controls change of a group: (G, N) weights and entropy, some tokens invalid."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
    weights = torch.where(mask, 1 + torch.rand(3, 7, generator=generator), 1.0)
    return argparse.Namespace(
        mask=mask, weights=weights, entropy=torch.rand(3, 7, generator=generator),
        completion_ids=torch.randint(50, (3, 7), generator=generator),
    )  # fmt: skip


def test_variants_are_presets_and_rules_of_a_file(tmp_path) -> None:
    rule = tmp_path / "my.py"
    rule.write_text("def looks(group, divergence, config):\n    return group.mask.float()\n")
    assert learning_variants.find_variant("vppo") == ({}, {"preset": "vppo"})
    assert learning_variants.find_variant(f"{rule}:looks") == ({}, {"method": f"{rule}:looks"})
    assert short_name(f"{rule}:looks") == "looks"
    for name, says in ((f"{rule}:look", "no function `look` in it; it has looks"), ("vpo", "expected FILE.py:NAME")):
        with pytest.raises(ValueError, match=says):
            learning_variants.find_variant(name)


# The two controls of the benchmark: weights shuffled within a response, and given to the most uncertain tokens.
@pytest.mark.parametrize("control", [learning_variants.shuffled_weights, learning_variants.entropy_weights])
def test_controls_keep_each_responses_weights(control, monkeypatch):
    group = weighted_group(0)
    before = group.weights
    monkeypatch.setattr(learning_variants, "weigh_tokens", lambda *_: before.clone())
    after = control(group, None, None)
    assert torch.equal(after[~group.mask], before[~group.mask])
    assert not torch.equal(after, before)
    for now, then, entropy, valid in zip(after, before, group.entropy, group.mask, strict=True):
        assert torch.equal(now[valid].sort().values, then[valid].sort().values)
        if control is learning_variants.entropy_weights:
            assert torch.equal(now[valid].argsort(), entropy[valid].argsort())


# Linear and quadratic growth, and none, each from another size of time.
@pytest.mark.parametrize(("power", "constant"), [(1.0, 3e-4), (2.0, 1e-6), (0.0, 0.2)])
def test_exponent_of_a_power_law(power, constant):
    rows = [{"value": v, "seconds": constant * v**power} for v in (64, 128, 512, 4096)]
    assert growth.exponent(rows, "seconds") == pytest.approx(power, abs=1e-9)


def test_memory_below_a_page_is_flat():
    rows = [{"value": v, "extra_bytes": v} for v in (1, 2, 4, 8)]
    assert growth.exponent(rows, "extra_bytes") == 0


@pytest.mark.parametrize("name", shapes.attention_shapes())
def test_shapes_cut_for_a_cpu_keep_what_decides(name):
    whole = shapes.attention_shapes()[name]
    cut = whole.on_cpu()
    assert cut.replay_flop <= shapes.CPU_FLOP
    assert cut.heads / cut.key_heads == whole.heads / whole.key_heads
    assert (cut.head_dim, cut.frames, cut.frame_keys) == (whole.head_dim, whole.frames, whole.frame_keys)


@pytest.mark.parametrize("name", shapes.vocabulary_shapes())
def test_vocabulary_shapes_cut_for_a_cpu(name):
    whole = shapes.vocabulary_shapes()[name]
    cut = whole.on_cpu()
    assert cut.flop <= shapes.CPU_FLOP and cut.vocabulary == whole.vocabulary and cut.responses == whole.responses
    assert cut.slots * 4 <= cut.tokens


def test_ratios_are_within_rounds():
    """A machine that slows down in between changes no ratio."""
    times = {"ours": [1.0, 3.0, 1.0], "bound": [0.5, 1.5, 0.5]}
    assert harness.paired_ratio(times, "ours", "bound") == 2.0
    assert harness.paired_ratio(times, "ours", None) is None


def test_measure_verifies_first():
    calls = []

    def verify():
        calls.append("verify")
        raise AssertionError("wrong")

    entry = harness.Entry("ours", "ours", lambda: calls.append("run"))
    with pytest.raises(AssertionError, match="wrong"):
        harness.measure(harness.Case("op", "shape", "float32", "work", "cpu", verify, [entry]))
    assert calls == ["verify"]


def test_measure_takes_turns_and_counts_memory():
    turns = []

    def entry(name, role, numbers):
        def run():
            turns.append(name)
            return torch.empty(numbers).fill_(1.0)

        return harness.Entry(name, role, run)

    entries = [entry("a", "ours", 1 << 20), entry("b", "bound", 1 << 18)]
    case = harness.Case("op", "shape", "float32", "work", "cpu", lambda: None, entries)
    rows = harness.measure(case, seconds=0, least=3, most=3)
    assert turns[:8] == ["a", "b", "a", "b", "b", "a", "a", "b"]  # the first two are not timed
    assert [row.extra_bytes for row in rows] == [4 << 20, 1 << 20]
    assert rows[1].ratio == 1 and rows[0].to_ours == 1 and rows[0].rounds == 3


def test_pictures_and_page_of_results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    rows = [
        harness.Row(op, "Qwen2.5-VL-7B", "float32", "small", name, role, 1.0, 0.9, 1.1, 3, 2.0, ours, 1 << 20)
        for op in ("group_divergence kl", "linear_weighted_surrogate", "something else")
        for name, role, ours in (("ours, torch", "ours", 1.0), ("bound: nothing", "bound", 0.5))
    ]
    path = command.write("operators-cpu", rows, {"a": {"ours, cuda": "no GPU"}}, None, "cpu")
    assert path.with_suffix(".png").stat().st_size > 5000
    assert len(command.headline([asdict(row) for row in rows], "cpu")) == 4
    learned = []
    for name, gain in (("grpo", 0.0), ("appo-hard", 0.0415)):
        numbers = {"validation": 0.5, "validation-grpo": gain, "validation 95%": 0.02}
        numbers |= {"ood": 0.25, "ood-grpo": -gain, "ood 95%": 0.5}
        numbers |= {"training": 0.375, "training-grpo": 0.0, "training 95%": 0.0}
        numbers |= dict.fromkeys(page.SELECTION, None if name == "grpo" else 0.75)
        learned.append({"variant": name, "seeds": 2, **numbers, "frames/precision": None})
    looks = [{"warm start": 0, "groups": 60, "right": 0.5, "wrong": 0.25, "hard-empty": 0.375, "chance": 0.25}]
    harness.save("learning", learned, device="cpu", steps=10, commits=["abc"], runs=[], looks=looks)
    plots.differences({"validation": [("appo-hard", 4.15, 2.0)]}, tmp_path / "learning.png")
    text = page.text()
    for expected in (
        "| ours, torch | 1,000.0 ms | 900.0 to 1,100.0 | 2.00 | 1.00 | 1 MiB |",
        "![Operators](../benchmarks/results/operators-cpu.png)",
        "Not run: ours, cuda: no GPU.",
        "| appo-hard | 50.0 (+4.2 ± 2.0) | 25.0 (-4.2 ± 50.0) | 37.5 (+0.0 ± 0.0) |",
        "| appo-hard | 75 % |  | 75 % | 75 % |",
        "| 0 | 60 | 50 % | 25 % | 38 % |  | 25 % |",
        "Not measured yet.",
    ):
        assert expected in text, expected


def test_a_case_measured_again_replaces_itself_only(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)

    def one(op: str, median: float) -> harness.Row:
        return harness.Row(op, "small", "float32", "work", "ours", "ours", median, 1.0, 1.0, 3, None, 1.0, 0)

    command.write("operators-cpu", [one("a", 1.0), one("b", 2.0)], {"a": {"peer": "why"}}, None, "cpu")
    command.write("operators-cpu", [one("b", 3.0)], {"b": {}}, harness.load("operators-cpu"), "cpu")
    content = harness.load("operators-cpu")
    assert [(row["op"], row["median"]) for row in content["rows"]] == [("a", 1.0), ("b", 3.0)]
    assert content["skipped"] == {"a": {"peer": "why"}, "b": {}}


# Measured by this code's commit, and found in a file without commits of rows, as older ones are.
@pytest.mark.parametrize("stamped", [True, False])
def test_rows_keep_the_commit_and_environment_of_their_measurement(tmp_path, monkeypatch, stamped):
    """Of cases that are not run again: contests, and growth with --only."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)

    def rows(ops: tuple[str, ...]) -> list[harness.Row]:
        return [
            harness.Row(op, "small", "float32", "work", "ours", "ours", 1.0, 1.0, 1.0, 3, None, 1.0, 0) for op in ops
        ]

    for commit, threads, ops in (("first", 7, ("a", "b", "c")), ("second", 8, ("b",)), ("third", 9, ("c",))):
        monkeypatch.setattr(harness, "commit", lambda commit=commit: commit)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        old = harness.resumed("operators-cpu") or {"rows": []}
        path = harness.save("operators-cpu", harness.merged(old["rows"], rows(ops)), device="cpu")
        if not stamped and commit == "first":
            content = json.loads(path.read_text())
            for row in content["rows"]:
                del row["commit"]
            path.write_text(json.dumps(content))
    content = harness.load("operators-cpu")
    assert {row["op"]: row["commit"] for row in content["rows"]} == {"a": "first", "b": "second", "c": "third"}
    assert [each["threads"] for each in (*content["earlier"], content["environment"])] == [7, 8, 9]
    text = page.text()
    assert "**a, small, float32**: work, commit first" in text and "**c, small, float32**: work\n" in text
    assert "*Where commit first is named: " in text and "commit first, " in text

    def sweeps(device: str) -> list[growth.Sweep]:
        return [growth.Sweep(op, "keys", (1, 2), lambda value: lambda: None, "") for op in ("a", "b")]

    monkeypatch.setattr(growth, "sweeps", sweeps)
    for commit, arguments in (("first", []), ("second", ["--only", "b"])):
        monkeypatch.setattr(harness, "commit", lambda commit=commit: commit)
        monkeypatch.setattr(sys, "argv", ["growth", "--device", "cpu", "--rounds", "1", "--threads", "1", *arguments])
        growth.main()
    content = harness.load("growth-cpu")
    assert [(row["op"], row["commit"]) for row in content["rows"]] == [("a", "first")] * 2 + [("b", "second")] * 2
    assert [each["commit"] for each in content["earlier"]] == ["first"]
    assert "| a | keys | , commit first |" in page.text()


def test_the_page_is_that_of_the_results():
    assert page.PAGE.read_text() == page.text(), "run `python -m benchmarks.page`"


def test_differences_are_taken_to_the_base_that_is_named():
    values = {"w1": 0.5, "oracle": 0.6, "grpo": 0.1}
    results = [
        {"task": "verbose-0", "variant": name, "seed": seed, **dict.fromkeys(learning.MEASURES.values(), value + seed)}
        for name, value in values.items()
        for seed in range(3)
    ]
    base, row = learning.summarise(results, ("w1", "oracle"), 3, "w1")
    assert row["validation-w1"] == pytest.approx(0.1) and row["validation 95%"] == pytest.approx(0, abs=1e-9)
    assert base["ood-w1"] == 0 and "validation-grpo" not in row


def test_the_oracle_weighs_the_words_that_tell():
    record = next(r for r in training.records() if r.meta["task"] == "colour")
    text = "<think> look i see red at step two so the colour is red there</think><answer>A</answer>"
    tokenizer = learning_variants.tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    group = argparse.Namespace(
        completion_ids=torch.tensor([ids]), mask=torch.ones(1, len(ids), dtype=torch.bool), texts=[text],
        prompt=argparse.Namespace(record=record),
    )  # fmt: skip
    weights = learning_variants.oracle_weights(group, None, APPOConfig(alpha=1.7))
    heavy = [tokenizer.decode([ids[t]]).strip() for t in (weights[0] > 1).nonzero().flatten().tolist()]
    assert heavy == ["red", "red", "A"] and weights.unique().tolist() == pytest.approx([1.0, 2.7])
