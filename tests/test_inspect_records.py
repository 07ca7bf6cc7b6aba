"""appo inspect --data: a page for each clip and one of all."""

import json
from pathlib import Path

import pytest
import training
from test_cli import refused, run

from appo.tasks.tiny import build_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = build_tiny(0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_each_record_with_a_video_has_a_page_and_all_are_on_one(tiny: Path, tmp_path: Path) -> None:
    file = Path(training.records()[0].meta["file"])
    rows = json.loads(file.read_text())
    rows.insert(1, {"question": "What is 1 + 1?", "answer": 2})
    rows[0]["problem" if "problem" in rows[0] else "question"] = "<b>bold</b> & what?"
    (tmp_path / "d.json").write_text(json.dumps(rows))
    settings = ["instructions=false", "fps=4", "max_frames=8", "max_pixels=784", "dtype=float32", "group_size=3"]
    settings += ["max_new_tokens=6", "strategy=all", "top_tokens=3", "top_frames=2", "slot_tokens=4"]
    code, printed = run(
        "inspect", "--model", tiny, "--data", tmp_path / "d.json", "--data-root", file.parent, "--limit", 2,
        "--output", tmp_path / "out", *settings,
    )  # fmt: skip
    assert code == 0 and "index.html" in printed
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("data:image/png") == 2 and "of 3 responses right" in page
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page and "1 + 1" not in page
    for place in ("0000", "0001"):
        assert f'href="{place}/inspection.html"' in page
        assert (tmp_path / "out" / place / "inspection.html").exists()


def test_one_clip_or_records_but_not_both(tmp_path: Path) -> None:
    assert "either --video or --data" in refused("inspect", "--model", "m")
    assert "either --video or --data" in refused("inspect", "--model", "m", "--video", "v", "--data", "d")
    assert "have their own" in refused("inspect", "--model", "m", "--data", "d", "--question", "?")
    (tmp_path / "d.json").write_text(json.dumps([{"question": "What is 1 + 1?", "answer": 2}]))
    code, printed = run("inspect", "--model", "m", "--data", tmp_path / "d.json")
    assert code == 2 and "expected records with a video" in printed
