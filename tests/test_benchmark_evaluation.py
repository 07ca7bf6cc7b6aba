"""appo eval --benchmark: local copies, stored answers, comparisons, pages, and a tiny model that is asked."""

import json
from pathlib import Path

import pytest
import training
from test_cli import refused, run

from appo.data.messages import prompt_messages
from appo.evaluation.catalog import BENCHMARKS
from appo.evaluation.files import read_benchmark
from appo.tasks import make_task
from appo.tasks.tiny import build_tiny

HEADER = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
TABLE = HEADER + (
    "11,300,320,240,why did he turn,noise,0,CW,noise,run,wave,fell,ball\n"
    "11,300,320,240,what fell then,cup,1,TN,book,cup,pen,hat,hat\n"
    "22,300,320,240,how did she sit,slowly,0,CH,slowly,fast,badly,well,not\n"
)
SPANS = {
    "11": {"duration": 10, "location": {"0": [[-0.2, 4.0]], "1": [[5, 6], [8, 9]]}, "fps": 30},
    "22": {"duration": 10, "location": {"0": [[2, 4]]}, "fps": 30},
}


@pytest.fixture
def grounding(tmp_path: Path) -> Path:
    """A local copy of NExT-GQA with three questions about two videos."""
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa/test.csv").write_text(TABLE)
    (tmp_path / "gqa/gsub_test.json").write_text(json.dumps(SPANS))
    (tmp_path / "gqa/map_vid_vidorID.json").write_text(json.dumps({"11": "0001/11", "22": "0002/22"}))
    return tmp_path / "gqa"


def answer(letter: str, times: str) -> str:
    return f"<think>so</think><answer>{letter}</answer><time>{times}</time>"


GOOD = {"11_0": answer("A", "0 to 4"), "11_1": answer("B", "5 to 6"), "22_0": answer("A", "2 to 3")}
BAD = GOOD | {"11_1": answer("C", "5 to 6"), "22_0": "no idea"}


def test_a_published_table_with_its_blemishes_is_read_and_scored(grounding: Path) -> None:
    records = read_benchmark(BENCHMARKS["next-gqa"], grounding)
    # A span that begins before the video is usable and is scored as published; equal options are no error here.
    assert [record.time_spans[0] for record in records] == [(0.0, 4.0), (5.0, 6.0), (2.0, 4.0)]
    scores = BENCHMARKS["next-gqa"].score(GOOD["11_0"], records[0])
    assert scores["mIoU"] == pytest.approx(4 / 4.2) and scores["mIoP"] == 1.0


def test_stored_answers_are_scored_without_a_model(grounding: Path, tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    code, printed = run("eval", "--benchmark", "next-gqa", "--data", grounding, "--answers", tmp_path / "good.json")
    lines = {line.split("  ")[0].strip(): line for line in printed.splitlines()}
    assert code == 0 and lines["Acc@GQA"].split()[1] == "100.0" and lines["no span"].split()[2] == "0.0"
    assert "3 questions" in lines["Acc@QA"] and "1 questions" in lines["Acc@GQA, type CH"]


# The same answers as objects under each name that answers go by, and in each kind of file.
FORMS = {
    "a.jsonl": lambda: "\n".join(json.dumps({"id": key, "response": text}) for key, text in BAD.items()),
    "b.json": lambda: json.dumps([{"question_id": key, "prediction": text} for key, text in BAD.items()]),
    "c.json": lambda: json.dumps({key: {"answer": "A", "pred": text} for key, text in BAD.items()}),
    "d.jsonl": lambda: "\n".join(json.dumps({"place": i, "id": "?", "text": t}) for i, t in enumerate(BAD.values())),
    "e.csv": lambda: "id,output\n" + "\n".join(f'{key},"{text}"' for key, text in reversed(BAD.items())),
}


@pytest.mark.parametrize("name", FORMS)
def test_two_models_are_compared_question_by_question(name: str, grounding: Path, tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    (tmp_path / name).write_text(FORMS[name]())
    command = ["eval", "--benchmark", "next-gqa", "--data", grounding, "--answers", tmp_path / "good.json"]
    code, printed = run(*command, "--against", tmp_path / name, "--page", tmp_path / "page.html")
    line = next(line for line in printed.splitlines() if line.startswith("Acc@GQA "))
    assert code == 0 and "2 answers better, 0 worse" in printed
    assert line.split("]")[0].split()[1] == "33.3" and "+66.7" in line
    page = (tmp_path / "page.html").read_text()
    assert "66.7" in page and "NExT-GQA" in page and "<script" not in page


# Answers that do not fit the records, one fault at a time, and what the error says.
WRONG = {
    "no answer to 1": (lambda: {k: v for k, v in GOOD.items() if k != "11_1"}, "got none to 1, the first being"),
    "unknown id": (lambda: GOOD | {"33_0": "A"}, "'33_0', which no record has"),
    "no text": (lambda: [{"id": "11_0", "text": 3}], "expected a text, got 3"),
    "twice": (lambda: [{"id": "11_0", "text": "A"}] * 2, "got a second one"),
    "no id": (lambda: [{"text": "A"}], "expected an object with `place` or an id"),
    "place": (lambda: [{"place": 3, "text": "A"}], "a place from 0 to 2, got 3"),
    "list": (lambda: ["A"], "expected an object with `place` or an id"),
}


@pytest.mark.parametrize("name", WRONG)
def test_answers_that_do_not_fit_are_refused(name: str, grounding: Path, tmp_path: Path) -> None:
    make, message = WRONG[name]
    (tmp_path / "a.json").write_text(json.dumps(make()))
    printed = refused("eval", "--benchmark", "next-gqa", "--data", grounding, "--answers", tmp_path / "a.json")
    assert message in " ".join(printed.split()) and "a.json" in printed


def test_what_is_asked_wrongly_is_named(grounding: Path, tmp_path: Path) -> None:
    command = ["eval", "--data", grounding, "--answers", tmp_path / "none.json"]
    assert "got 'nextgqa'. Did you mean `next-gqa`?" in refused(*command, "--benchmark", "nextgqa")
    assert "Pass --benchmark NAME" in refused(*command)
    assert "no such file" in refused(*command, "--benchmark", "next-gqa").lower()
    assert "got both" in refused(*command, "--benchmark", "next-gqa", "--model", "m")
    assert "expected benchmark or training" in refused(*command, "--benchmark", "next-gqa", "--prompt", "own")
    empty = tmp_path / "empty"
    empty.mkdir()
    printed = refused("eval", "--data", empty, "--answers", "a.json", "--benchmark", "vsi-bench")
    assert "expected the files of VSI-Bench" in printed
    several = refused("eval", "--data", empty, "--model", "m", "--benchmark", "vsi-bench", "eval_samples=4")
    assert "expected 0 or 1 for a benchmark" in several


def test_a_benchmarks_prompt_is_the_whole_user_turn(grounding: Path) -> None:
    (record, *_) = read_benchmark(BENCHMARKS["next-gqa"], grounding)
    (message,) = prompt_messages(record, text=BENCHMARKS["video-mme"].ask(record))
    assert message["role"] == "user" and [part["type"] for part in message["content"]] == ["video", "text"]
    assert message["content"][1]["text"].endswith("E. ball\nThe best answer is:")


def test_a_model_is_asked_and_its_answers_score_the_same_again(tmp_path: Path) -> None:
    paths = make_task(tmp_path / "task", seed=5, sizes={"train": 4}, workers=1)
    made = training.load_records(paths["train"])
    rows = [
        {
            "video": str(record.media[0].path.relative_to(paths["train"].parent)),
            "question": record.question,
            "candidates": [option[3:] for option in record.options],
            "answer": next(option[3:] for option in record.options if option[0] == record.answer),
        }
        for record in made
    ]
    (paths["train"].parent / "json").mkdir()
    for name, part in (("action_count", rows[:2]), ("moving_count", rows[2:])):
        (paths["train"].parent / f"json/{name}.json").write_text(json.dumps(part))
    model, processor = build_tiny(0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    common = ["eval", "--benchmark", "mvbench", "--data", paths["train"].parent]
    settings = ["fps=4", "max_pixels=784", "dtype=float32", "max_new_tokens=4"]
    asked = [*common, "--model", tmp_path / "model", "--output", tmp_path / "a.jsonl", *settings]
    code, printed = run(*asked)
    assert code == 0 and "accuracy, task action_count" in printed and "4 questions" in printed
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 4
    # Cut short, it goes on; with other prompts the file is refused; stored answers give the same table.
    (tmp_path / "a.jsonl").write_text("".join(lines[:2]))
    assert rows_of(run(*asked)[1]) == rows_of(printed) != []
    assert (tmp_path / "a.jsonl").read_text() == "".join(lines)
    assert "another model or other settings" in " ".join(refused(*asked, "--prompt", "training").split())
    assert rows_of(run(*common, "--answers", tmp_path / "a.jsonl")[1]) == rows_of(printed)


def rows_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.endswith("questions")]
