"""Answers read by the rules of published benchmarks, against tables made by hand."""

from pathlib import Path

import pytest

from appo.data.records import DataError, Media, Record
from appo.evaluation import reading
from appo.evaluation.catalog import BENCHMARKS, relative_accuracy
from appo.evaluation.scoring import score_answers, table

OPTIONS = ("A. a red cup", "B. Dogs run", "C. nothing", "D. Both of these")


def record(answer: str = "B", options: tuple[str, ...] = OPTIONS, video: str = "v", **values) -> Record:
    meta = {"file": "f.json", "index": 0} | values.pop("meta", {})
    values = {"id": "1", "question": "What?", "kind": "multiple choice"} | values
    return Record(answer=answer, options=options, media=(Media("video", Path(video)),), meta=meta, **values)


# Each answer beside what the rule of each benchmark reads in it: Video-MME and LongVideoBench, Perception Test,
# SEED-Bench-R1, VSI-Bench, MVBench, ours, NExT-QA.
ANSWERS = {
    "B": "BBBBBBB",
    "B.": "BBBBBBB",
    "b": "...BB..",
    "(B)": "BB..BBB",
    "(b) dogs": "....B..",
    "B. Dogs run": "BBBBBBB",
    "The best answer is B": "BB...BB",
    "Answer: B": "ABA..BB",
    "Dogs run": "D.D..B.",
    "": ".......",
    "I do not know": ".......",
    "It is C, not D": "CC...DD",
    "A cup": "AAAAAAA",
    "Both A and C": "BAB..CC",
}
RULES = (
    reading.first_letter("ABCD"), reading.first_lone_letter, reading.leading_character, reading.first_word,
    reading.opening_option, reading.named_option, reading.last_listed,
)  # fmt: skip


@pytest.mark.parametrize("text", ANSWERS)
def test_letters_are_read_by_each_benchmarks_own_rule(text):
    assert "".join(rule(text, record()) or "." for rule in RULES) == ANSWERS[text]


def test_published_rules_know_no_fewer_letters_than_they_were_written_with():
    """A question with two options, an answer that names a further one first: wrong there, wrong here."""
    two = record("B", ("A. one", "B. two"))
    assert reading.first_letter("ABCDE")("E or B", two) == "E"
    assert reading.first_letter("ABCD")("E or B", two) == "B"
    assert reading.first_lone_letter("D or B", two) == "D"
    text = "so it runs, and the man saw the dogs run before nothing"
    assert reading.last_listed(text, record()) == "C"  # of two options' texts the later one
    answers = "<answer>B</answer> or <answer>A</answer>"
    (scores,) = score_answers(BENCHMARKS["seed-bench-r1"], [record("B", source="SEED-Bench-R1")], [answers])
    assert scores["accuracy"] == 1.0  # the first tag


def test_the_answer_is_the_inside_of_its_tag_or_what_follows_the_reasoning():
    assert reading.answer_part("<think>A or B</think><answer> B </answer>") == "B"
    assert reading.answer_part("<think>A or\nB</think> C.") == "C."
    assert reading.answer_part("<answer>A</answer><answer>B</answer>") == "<answer>A</answer><answer>B</answer>"


CAPTIONS = "Which caption matches the video better?\nCaption A: A dog runs.\nCaption B: A dog sits."


# The label, the caption, the letter, each with what models put around it; a caption that is none, and nothing.
@pytest.mark.parametrize(
    "text, letter",
    [
        ("Caption B: A dog sits.", "B"), ("A dog sits.", "B"), ("B", "B"), ("Caption A", "A"), ("B.", "B"),
        ("B) A dog sits.", "B"), ("The dog sits", None), ("", None),
    ],
)  # fmt: skip
def test_tempcompass_captions(text, letter):
    captions = record(
        options=("A. A dog runs.", "B. A dog sits."), meta={"asked": CAPTIONS, "form": "caption_matching"}
    )
    assert reading.matched_caption(text, captions) == letter


# |value - truth| / truth against 1 - threshold for thresholds 0.5, 0.55, ..., 0.95.
@pytest.mark.parametrize(
    "value, truth, share",
    [(4, 4, 1.0), (5, 4, 0.6), (6, 4, 0.1), (6.1, 4, 0.0), (2, 4, 0.1), (0, 4, 0.0), (-4, 4, 0.0)],
)
def test_mean_relative_accuracy(value, truth, share):
    assert relative_accuracy(value, truth) == pytest.approx(share)


# A number, its unit, a word before it, a number as a word, our own tags, and one that is none.
@pytest.mark.parametrize(
    "text, score",
    [
        ("4", 1.0),
        ("4.", 1.0),
        ("5 metres", 0.6),
        ("about 4", 0.0),
        ("four", 0.0),
        ("<answer>4</answer>", 1.0),
        ("nan", 0.0),
    ],
)
def test_vsi_bench_reads_the_first_word_as_a_number(text, score):
    number = record("4", (), kind="regression", source="VSI-Bench", meta={"task": "object_counting"})
    assert score_answers(BENCHMARKS["vsi-bench"], [number], [text])[0]["score"] == pytest.approx(score)


def test_vsi_bench_is_the_mean_of_eight_tasks_in_which_three_directions_are_one():
    tasks = {
        "object_rel_direction_easy": [1, 1],
        "object_rel_direction_medium": [0],
        "object_rel_direction_hard": [1, 0],
        "route_planning": [1, 0, 0, 0],
    }
    records, texts = [], []
    for task, rights in tasks.items():
        for place, right in enumerate(rights):
            records.append(
                record("A", ("A. left", "B. right"), f"{task}{place}", source="VSI-Bench", meta={"task": task})
            )
            texts.append("A" if right else "B")
    rows = table(BENCHMARKS["vsi-bench"], records, score_answers(BENCHMARKS["vsi-bench"], records, texts))
    found = {row.label: row.found.value for row in rows}
    assert found["score, task object_rel_direction"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["score, task route_planning"] == pytest.approx(0.25)
    assert found["score"] == pytest.approx((0.5 + 0.25) / 2)


# Named span against true ones (10, 20) and (30, 34): IoU over the hull of both, IoP over the named span, best of each.
@pytest.mark.parametrize(
    "named, iou, iop",
    [
        ("10 to 20", 1.0, 1.0), ("15 to 25", 1 / 3, 0.5), ("12 to 14", 0.2, 1.0), ("0 to 40", 0.25, 0.25),
        ("21 to 29", 0.0, 0.0), ("12 to 12", 0.0, 1.0), ("25 to 25", 0.0, 0.0), ("31 to 33, 12 to 13", 8 / 23, 8 / 21),
        ("soon", 0.0, 0.0),
    ],
)  # fmt: skip
def test_next_gqa_grounding(named, iou, iop):
    benchmark = BENCHMARKS["next-gqa"]
    truth = record(source="NExT-GQA", time_spans=((10.0, 20.0), (30.0, 34.0)), meta={"grounding": True, "qtype": "TC"})
    texts = [f"<think>.</think><answer>{letter}</answer><time>{named}</time>" for letter in "BA"]
    right, wrong = score_answers(benchmark, [truth, truth], texts)
    assert (right["mIoU"], right["mIoP"]) == pytest.approx((iou, iop))
    assert [right[f"IoU@0.{k}"] for k in (3, 5)] == [iou >= 0.3, iou >= 0.5]
    assert (right["Acc@GQA"], wrong["Acc@GQA"], wrong["mIoU"]) == (float(iop >= 0.5), 0.0, right["mIoU"])


def test_records_of_another_benchmark_and_without_spans_are_refused():
    with pytest.raises(DataError, match="expected a record of MVBench, got one of Video-MME"):
        score_answers(BENCHMARKS["mvbench"], [record(source="Video-MME")], ["B"])
    with pytest.raises(DataError, match=r"gsub_test\.json"):
        score_answers(BENCHMARKS["next-gqa"], [record(source="NExT-GQA")], ["B"])
    with pytest.raises(DataError, match="captioning"):
        score_answers(BENCHMARKS["tempcompass"], [record(source="TempCompass", meta={"form": "captioning"})], ["B"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_right_answer_in_the_form_that_the_prompt_asks_for_is_right(name):
    benchmark = BENCHMARKS[name]
    meta = {"task": "t", "form": "multi-choice", "asked": "What?\nA. a red cup\nB. Dogs run", "grounding": True}
    right = record(source=benchmark.sources[0], time_spans=((1.0, 2.0),), meta=meta)
    prompt = "" if benchmark.ask is None else benchmark.ask(right)
    forms = ["B", "B.", "B. Dogs run"] if "<think>" not in prompt and name != "next-gqa" else []
    texts = [*forms, "<think>A or C</think><answer>B</answer><time>1 to 2</time>"]
    for text in texts:
        (scores,) = score_answers(benchmark, [right], [text])
        assert scores[benchmark.headline[0]] == 1.0 and scores["unreadable"] == 0.0, text
    (wrong,) = score_answers(benchmark, [right], ["<think>B</think><answer>C</answer><time>1 to 2</time>"])
    assert wrong[benchmark.headline[0]] == 0.0


def test_the_documents_table_is_the_catalog():
    text = (Path(__file__).parents[1] / "docs/evaluation.md").read_text()
    for benchmark in BENCHMARKS.values():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{benchmark.name}` "))
        groups = ", ".join(facet.name for facet in benchmark.facets)
        for part in (
            benchmark.paper,
            benchmark.rules,
            benchmark.departs,
            f"{', '.join(benchmark.headline)}; by {groups}",
        ):
            assert part in row, benchmark.name
