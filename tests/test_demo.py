"""The demo, small: its own lines only, its page, and what it says of the frames that were picked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from appo import demo
from appo.reports.runs import Run

SCRIPT = """
import sys
from pathlib import Path
from appo import demo
clips, warm = demo.make_clips, demo.warm_start
sizes = {"warmup": 16, "train": 32, "validation": 6, "ood": 2}
demo.make_clips = lambda folder, seed: clips(folder, seed, sizes=sizes)
demo.warm_start = lambda folder, data, seed: warm(folder, data, seed, looking_steps=2, steps=3)
demo.SETTINGS |= {"eval_samples": 1, "eval_every": 2, "save_every": 2, "sample_every": 1}
demo.run_demo(Path(sys.argv[1]), steps=2)
"""
# Lines of the demo. What a library prints between them (a bar, a warning, a note) is none of these.
OWN = (
    r"clips: \S+ \(\d+ s\)",
    r"clips: using \S+",
    r"decoding clips .* 16/16",
    r"warm start, loss .* \d+/\?",
    r"warm start: \S+ \(\d+ s\)",
    r"warm start: using \S+",
    r"training: (APPO|GRPO), \S+",
    r"step 2/2 .* accuracy \d\.\d\d .* s/step .*",
    r"What APPO picked, mean over 2 steps:",
    r"(questions with frames picked|weighted words) +\d+%",
    r"(picked frames that decide|deciding frames picked) +\d+%  \(\d+% by chance\)",
    r"Held-out accuracy, before and after \(one seed: a few points are chance\):",
    r"(APPO|GRPO) +\d+% -> \d+%",
    r"close-ups: \S+ \(\d+ s\)",
    r"close-ups: using \S+",
    r"Done in \d+ s\. Open \S+/report\.html",
)


def test_the_demo_prints_its_own_lines_and_draws_one_page(tmp_path: Path) -> None:
    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-W", "default", "-c", SCRIPT, "out"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return [line.strip() for line in done.stdout.splitlines() if line.strip()]

    lines = run()
    assert [line for line in lines if not any(re.fullmatch(own, line) for own in OWN)] == []
    assert sum(line.startswith("training: ") for line in lines) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 training runs side by side" in page and "The method at work in run-appo" in page
    assert len(list((tmp_path / "out" / "run-appo").glob("inspect-before-training/validation-*/inspection.png"))) > 0
    assert "One clip of run-appo up close, before training" in page
    # Interrupted or not, the same command goes on from what is there.
    again = run()
    assert [line for line in again if line.startswith(("clips", "warm start"))] == [
        "clips: using out/data",
        "warm start: using out/warm",
    ]
    start = "What APPO picked, mean over 2 steps:"
    assert again[again.index(start) : -1] == lines[lines.index(start) : -1]


def test_the_summary_says_what_chance_would_have_picked() -> None:
    metrics = [
        {"step": 1, "frames/empty": 0.5, "frames/precision": 0.75, "frames/precision_chance": 0.25,
         "frames/recall": 0.5, "frames/recall_chance": 0.125, "weight/share": 0.25},
        {"step": 2, "frames/empty": 0.0, "frames/precision": 0.25, "frames/precision_chance": 0.25,
         "frames/recall": 0.0, "frames/recall_chance": 0.125, "weight/share": 0.75},
    ]  # fmt: skip
    evaluations = [{"step": step, "split": "validation", "accuracy": value} for step, value in ((0, 0.4), (2, 0.9))]
    run = Run(Path("run-appo"), "run-appo", {"method": "appo"}, metrics, evaluations, [])
    other = Run(Path("run-grpo"), "run-grpo", {"method": "grpo"}, [{"step": 1}], evaluations, [])
    assert [re.sub(" +", " ", line.strip()) for line in demo.summary([run, other])] == [
        "What APPO picked, mean over 2 steps:",
        "questions with frames picked 75%",
        "picked frames that decide 50% (25% by chance)",
        "deciding frames picked 25% (12% by chance)",
        "weighted words 50%",
        "Held-out accuracy, before and after (one seed: a few points are chance):",
        "APPO 40% -> 90%",
        "GRPO 40% -> 90%",
    ]
    assert len(demo.summary([other])) == 2


def test_an_unknown_method_is_refused_before_any_work(tmp_path: Path) -> None:
    rule = tmp_path / "my.py"
    rule.write_text("def looks(group, divergence, config):\n    return group.mask.float()\n")
    with pytest.raises(demo.ConfigError, match=r"`method`: .* appo, .*ral, or FILE\.py:NAME, got 'vpo'.*`vppo`"):
        demo.run_demo(tmp_path / "out", method="vpo")
    with pytest.raises(ValueError, match="no function `look` in it; it has looks"):
        demo.run_demo(tmp_path / "out", method=f"{rule}:look")
    with pytest.raises(demo.ConfigError, match="`mass_reduction`: expected sum"):
        demo.run_demo(tmp_path / "out", method="vppo", overrides=["mass_reduction=mean"])
    with pytest.raises(demo.ConfigError, match="`output`: expected none, got 'elsewhere': the demo makes its own"):
        demo.run_demo(tmp_path / "out", overrides=["output=elsewhere"])
    with pytest.raises(demo.ConfigError, match=r"`task`: expected one of moment, cue, .*Did you mean `verbose-48x4`"):
        demo.run_demo(tmp_path / "out", task="verbose-48x5")
    assert not (tmp_path / "out").exists()


# Every method by name, and a rule of a file, whose settings are the method's alone; GRPO beside it.
@pytest.mark.parametrize("method", [*demo.METHODS, "own"])
def test_a_method_trains_beside_grpo_from_one_warm_start(method: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "stage", lambda name, folder, make: folder)
    monkeypatch.setattr(demo, "write_report", lambda folders, page: page)
    monkeypatch.setattr(demo, "read_runs", lambda folders: [])
    trained = {}

    def train(run: Path, clips: Path, warm: Path, *, settings: dict, overrides: list) -> Path:
        trained[run.name] = demo.APPOConfig.from_dict(demo.SETTINGS | settings, list(overrides))
        return run

    monkeypatch.setattr(demo, "train", train)
    overrides = ["learning_rate=2e-4"]
    if method == "own":
        (tmp_path / "my.py").write_text("def looks(group, divergence, config):\n    return group.mask.float()\n")
        method, overrides = f"{tmp_path}/my.py:looks", ["learning_rate=2e-4", "mass_reduction=sum"]
    demo.run_demo(tmp_path, method=method, overrides=overrides)
    own = "run-looks" if ".py:" in method else f"run-{method}"
    assert list(trained) == list(dict.fromkeys([own, "run-grpo"]))
    assert trained[own].learning_rate == 2e-4 and (method == "grpo" or trained["run-grpo"].learning_rate == 3e-4)
    if ".py:" in method:
        assert (trained[own].method, trained[own].mass_reduction) == (method, "sum")
    elif method not in ("appo", "released"):
        assert trained[own].method == demo.APPOConfig.preset(method).method


def test_an_engine_that_is_missing_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(demo.ConfigError, match="`vllm_python`, the interpreter"):
        demo.run_demo(tmp_path / "out", engine="vllm-server")
    with pytest.raises(demo.ConfigError, match="`engine`: expected one of transformers"):
        demo.run_demo(tmp_path / "out", engine="vlm")
    assert not (tmp_path / "out").exists()


def test_another_task_has_its_clips_warm_start_settings_and_folders(tmp_path, monkeypatch) -> None:
    """Of verbose-24x4: one kind of clips, irrelevant words, room for them; the folders of "moment" stay."""
    calls: dict[str, object] = {}

    def touch(name: str):
        def make(folder: Path, *arguments: object, **options: object) -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            calls[name] = options
            return folder

        return make

    for name in ("make_clips", "warm_start", "train"):
        monkeypatch.setattr(demo, name, touch(name))
    monkeypatch.setattr(demo, "write_report", lambda folders, page: page.write_text("") and page)
    monkeypatch.setattr(demo, "summary", lambda runs: [])
    monkeypatch.setattr(demo, "read_runs", lambda folders: [])
    demo.run_demo(tmp_path, task="verbose-24x4", compare=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "data-verbose-24x4", "warm-verbose-24x4", "run-appo-verbose-24x4", "report-verbose-24x4.html",
    }  # fmt: skip
    assert calls["make_clips"]["kinds"] == ("colour",) and calls["warm_start"]["irrelevant"].words == 24
    assert calls["train"]["settings"]["max_new_tokens"] > 24 + 24 and calls["train"]["settings"]["max_steps"] == 36
