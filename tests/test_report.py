"""write_report and write_inspection: what is on the page, what is left out, and what they refuse."""

import json
import re
from pathlib import Path

import pytest
import torch
from page_inputs import inspection, write_run, write_small_run
from PIL import Image

from appo.reports.attention_map import write_inspection
from appo.reports.charts import smoothing_window, trailing_mean
from appo.reports.inspect_clip import pictures
from appo.reports.run_report import ReportError, write_report


def headings(page: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page.read_text())


def test_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = write_report([run], tmp_path / "out" / "report.html")
    text = page.read_text()
    assert page == tmp_path / "out" / "report.html"
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    values = [line["accuracy"] for line in lines if line["split"] == "eval"]
    assert f"{values[0]:.0%} →</span> {values[-1]:.0%}" in text
    assert f"{100 * (values[-1] - values[0]):+.0f} points from step 0 (before training) to step 40" in text
    other = [line["accuracy"] for line in lines if line["split"] == "ood"]
    assert f'Held-out accuracy, ood</h3><b><span class="from">{other[0]:.0%} →</span> {other[-1]:.0%}' in text
    assert headings(page) == [
        "What happened here",
        "The method at work",
        "Learning and exploring",
        "Where the model looked",
        "Answers and step size",
        "Where the time goes",
        "By kind of question",
        "Responses, word by word",
        "Settings",
    ]
    assert "All 40 steps done" in text
    assert "means of 4 steps" in text
    assert "up to 2.7 times" in text
    with Image.open(page.with_suffix(".png")) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 50


def test_page_is_self_contained_and_the_same_each_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = write_report([run], tmp_path / "a.html").read_text()
    assert write_report([run], tmp_path / "b.html").read_text() == first
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", first)


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, method=name, seed=i) for i, name in enumerate(("appo", "grpo", "dapo"))]
    page = write_report(runs, tmp_path / "report.html")
    text = page.read_text()
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", text)
    assert rows[:3] == [("appo", "APPO"), ("grpo", "GRPO"), ("dapo", "DAPO")]
    assert headings(page)[0] == "Results"
    assert "holds over several seeds" in text


def test_settings_in_which_runs_differ_stand_first(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps=5, seed=seed) for seed, name in enumerate(("a", "b"))]
    for number, run in enumerate(runs):
        path = run / "config.yaml"
        kept = [line for line in path.read_text().splitlines() if not line.startswith(("alpha:", "output:"))]
        path.write_text("\n".join([*kept, f"alpha: {number + 0.5}", f"output: place-{number}"]))
    text = write_report(runs, tmp_path / "page.html").read_text()
    settings = text[text.index("first where they differ") :]
    assert "<tr><td>alpha</td><td>0.5</td><td>1.5</td></tr>" in settings
    assert settings.index("<td>alpha</td>") < settings.index("<pre>")
    assert "<td>output</td>" not in text and "<td>max_steps</td>" not in text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_small_run(tmp_path / seed / "run") for seed in ("s0", "s1")]
    text = write_report(runs, tmp_path / "report.html").read_text()
    assert "<td>s0/run</td>" in text
    assert "<td>s1/run</td>" in text


def test_grpo_says_that_words_counted_alike_and_has_no_frames(tmp_path: Path) -> None:
    page = write_report([write_run(tmp_path / "run", method="grpo")], tmp_path / "report.html")
    assert "This run gave all words the same weight" in page.read_text()
    assert "Where the model looked" not in headings(page)
    assert 'style="background:rgba' not in page.read_text()


def test_a_run_that_is_still_going(tmp_path: Path) -> None:
    run = write_small_run(tmp_path / "run", steps=7)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "reward": 0.')
    text = write_report([run], tmp_path / "report.html").read_text()
    assert "Step 7 of 40, not finished" in text


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        (run / name).unlink()
    page = write_report([run], tmp_path / "report.html")
    assert "No step finished yet" in page.read_text()
    assert headings(page) == ["What happened here", "Settings"]


def test_metrics_that_are_not_there_leave_no_hole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": step, "reward": 0.1 * step, "entropy": None} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([run], tmp_path / "report.html")
    assert page.read_text().count("<figure") == 1
    assert headings(page) == ["What happened here", "Learning and exploring"]


def test_one_step_and_metrics_that_come_late(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1, max_steps=1)
    assert write_report([run], tmp_path / "report.html").read_text().count("<figure") > 10
    late = tmp_path / "late"
    late.mkdir()
    lines = [{"step": 1, "time/rollout": 1.0}, {"step": 2, "time/rollout": 1.0, "time/score": 0.5}]
    (late / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report([late, run], tmp_path / "both.html").is_file()
    assert write_report([late], tmp_path / "late.html").read_text().count("<figure") == 1


def test_text_of_the_model_cannot_become_markup(tmp_path: Path) -> None:
    run = write_small_run(tmp_path / "run", steps=10)
    evil = "</p><script>alert(1)</script>"
    sample = {"step": 1, "question": evil, "options": [f"A. {evil}"], "answer": "A"}
    sample["completions"] = [{"text": evil, "tokens": [evil], "weights": [1.5], "accuracy": 1.0, "reward": 1.0}]
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    assert "<script>" not in write_report([run], tmp_path / "report.html").read_text()
    inputs = inspection(G=1) | {"tokens": [[evil]], "question": evil, "options": [f"A. {evil}"]}
    _, page = write_inspection(tmp_path / "inspection", **inputs)
    assert page.read_text().count("<script>") == 1
    assert "alert(1)</script>" not in page.read_text()


def test_tokens_are_tinted_by_weight(tmp_path: Path) -> None:
    run = write_small_run(tmp_path / "run", steps=10)
    completion = {
        "text": "a b",
        "tokens": ["a", " b", "\n"],
        "weights": [1.0, 2.0, 1.5],
        "accuracy": 1.0,
        "frames": [2],
    }
    sample = {"step": 1, "question": "?", "answer": "b", "labelled_frames": [2, 3], "completions": [completion]}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    text = write_report([run], tmp_path / "report.html").read_text()
    assert 'title="weight 1.00" style="background:rgba(245,158,11,0.000)">a<' in text
    assert 'title="weight 2.00" style="background:rgba(245,158,11,0.850)"> b<' in text
    assert 'style="background:rgba(245,158,11,0.425)">⏎<' in text
    assert "Frames picked: 2. The question is decided in 2, 3: 1 of 2 found." in text


def test_the_inspection_of_a_run_is_shown_with_a_link(tmp_path: Path) -> None:
    run = write_small_run(tmp_path / "runs" / "appo", steps=5)
    for name in ("b", "a"):
        write_inspection(run / "inspect" / name, **inspection())
    page = write_report([run], tmp_path / "pages" / "report.html")
    links = re.findall(r'href="(\.\./.*?)"', page.read_text())
    assert links == [f"../runs/appo/inspect/{name}/inspection.html" for name in ("a", "b")]
    assert page.read_text().count("data:image/png") == 1
    assert "One clip up close" in headings(page)


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="expected at least one run folder, got none"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(ReportError, match="gone: expected a run folder, got no such folder"):
        write_report([tmp_path / "gone"], tmp_path / "x.html")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(
        ReportError, match=r"other: expected a run folder with .*metrics.jsonl.*, got one with notes.txt"
    ):
        write_report([tmp_path / "other"], tmp_path / "x.html")


# Each file of a run: no JSON, no step, no object; no YAML, no settings.
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', r"metrics.jsonl: line 2: expected JSON"),
        ("metrics.jsonl", '{"reward": 1}\n', r"metrics.jsonl: line 1: expected an object with a whole `step`"),
        ("eval.jsonl", "[1]\n", r"eval.jsonl: line 1: expected an object"),
        ("config.yaml", "a: [1\n", r"config.yaml: expected YAML"),
        ("config.yaml", "- 1\n- 2\n", r"config.yaml: expected `field: value` lines"),
    ],
)
def test_files_that_do_not_parse(tmp_path: Path, name: str, content: str, message: str) -> None:
    run = write_run(tmp_path / "run", steps=3)
    (run / name).write_text(content)
    with pytest.raises(ReportError, match=message):
        write_report([run], tmp_path / "x.html")


def test_the_pictures_of_two_videos_stand_in_order_whole_and_told_apart(tmp_path: Path) -> None:
    def video(frames: int, height: int, width: int, first: int) -> torch.Tensor:
        grey = torch.arange(first, first + frames, dtype=torch.uint8)
        return grey[:, None, None, None].expand(-1, 3, height, width)

    shown = pictures([video(3, 4, 8, 10), video(2, 6, 4, 20)], 2)  # of two sampled frames each: 2 frames, then 1
    assert shown.shape == (6, 3, 6, 8)
    assert shown[:, 0, 3, 4].tolist() == [10, 11, 12, 12, 20, 21]
    assert (shown[:4, :, [0, 5]] == 255).all() and (shown[4:, :, :, [0, 1, 6, 7]] == 255).all()

    mass = torch.rand(1, 2, 3)
    page = write_inspection(
        tmp_path, frames=shown, times=[(0.0, 0.5), (1.0, 1.0), (0.0, 0.5)], tokens=[["a", "b"]], mass=mass,
        selected=None, weights=None, rewards=[1.0],
    )[1]  # fmt: skip
    assert [frame["time"] for frame in page_data(page)["frames"]] == [
        "video 1, 0.0-0.5 s",
        "video 1, 1.0 s",
        "video 2, 0.0-0.5 s",
    ]


def test_smoothing() -> None:
    assert trailing_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert [smoothing_window(steps) for steps in (0, 1, 40, 200)] == [1, 1, 4, 20]


def page_data(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_inspection_carries_what_was_measured(tmp_path: Path) -> None:
    inputs = inspection()
    picture, page = write_inspection(tmp_path / "out", **inputs)
    data = page_data(page)
    assert [frame["picked"] for frame in data["frames"]] == [False] * 4 + [True, False, True, False]
    assert [frame["labelled"] for frame in data["frames"]] == [False] * 4 + [True, True, False, False]
    assert data["frames"][1]["time"] == "0.5-0.8 s"
    for i, response in enumerate(data["responses"]):
        n = len(inputs["tokens"][i])
        assert response["tokens"] == inputs["tokens"][i]
        torch.testing.assert_close(torch.tensor(response["mass"]), inputs["mass"][i, :n], rtol=6e-3, atol=0)
        torch.testing.assert_close(torch.tensor(response["weights"]), inputs["weights"][i, :n], rtol=0, atol=6e-4)
    text = page.read_text()
    assert "4 answers to one question about one clip, 2 of them right" in text
    assert "APPO picked 2 of 8 frames. 2 decide the question, and 1 of these was picked." in text
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height > 300


def test_inspection_without_weights_frames_or_truth(tmp_path: Path) -> None:
    inputs = inspection() | {"weights": None, "selected": [], "labelled": [], "answer": "", "options": []}
    _, page = write_inspection(tmp_path, **inputs)
    data = page_data(page)
    assert (data["top"], data["truthKnown"]) == (1.0, False)
    assert "No frame was picked, so every word counts once." in page.read_text()
    assert "known for this clip" not in page.read_text()


def test_inspection_of_hostile_groups(tmp_path: Path) -> None:
    inputs = inspection(G=3, F=5)
    # An odd number of sampled frames, an empty response, a frame and a response without any mass, a long response.
    inputs["frames"] = inputs["frames"][:9]
    inputs["tokens"] = [[], ["$x$", " ", "\t"], [f"w{i}" for i in range(200)]]
    inputs["mass"] = torch.zeros(3, 200, 5)
    inputs["weights"] = torch.ones(3, 200)
    inputs["selected"] = inputs["labelled"] = [0]
    picture, page = write_inspection(tmp_path, **inputs)
    assert picture.is_file()
    assert [len(response["tokens"]) for response in page_data(page)["responses"]] == [0, 3, 200]
    assert page_data(page)["responses"][1]["tokens"] == ["$x$", "␣", "⇥"]


# One argument at a time of another length, shape, dtype or range than the others.
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"mass": torch.rand(4, 24)}, "mass"),
        ({"mass": torch.rand(0, 24, 8)}, "mass"),
        ({"mass": torch.rand(4, 24, 0)}, "mass"),
        ({"frames": torch.zeros(7, 3, 8, 8, dtype=torch.uint8)}, "frames"),
        ({"frames": torch.zeros(8, 8, 8, 3, dtype=torch.uint8)}, "frames"),
        ({"frames": torch.zeros(8, 3, 8, 8)}, "frames"),
        ({"times": [(0.0, 1.0)]}, "times"),
        ({"tokens": [["a"]]}, "tokens"),
        ({"tokens": [["a"] * 25] * 4}, "tokens"),
        ({"weights": torch.ones(4, 3)}, "weights"),
        ({"rewards": [1.0]}, "rewards"),
        ({"accuracy": [1.0]}, "accuracy"),
        ({"selected": [8]}, "selected"),
        ({"labelled": [-1]}, "labelled"),
    ],
)
def test_inspection_refuses(tmp_path: Path, changed: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"write_inspection: `{named}`: expected .* got "):
        write_inspection(tmp_path, **(inspection() | changed))
