"""docs/data.md: every record it shows loads or is refused as it says, and its reward runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from appo.data.load import load_records
from appo.data.records import DataError, Record
from appo.rollout.rewards import combine

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


# Every block of the page, so that a new one is tested too.
@pytest.mark.parametrize("block", blocks("json"))
def test_records_that_are_shown_load(tmp_path: Path, block: str) -> None:
    rows = json.loads(block)
    (tmp_path / "all.json").write_text(block)
    together = load_records(tmp_path / "all.json")
    assert len(together) == len(rows) >= 2
    assert all(record.question and record.answer for record in together)


def test_what_the_plain_records_say(tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text(blocks("json")[1])
    choice, moment, frames, images, text = load_records(tmp_path / "plain.json")
    assert (choice.kind, choice.answer) == ("multiple choice", "B")
    assert (moment.asks_time, moment.media[0].start, moment.media[0].end) == (True, 3.0, 9.5)
    assert (frames.kind, len(frames.media[0].frames), frames.media[0].fps) == ("numerical", 2, 2.0)
    assert (images.answer, len(images.media), text.kind, text.media) == ("A", 2, "math", ())


REFUSED: list[dict[str, Any]] = [case for block in blocks("json refused") for case in json.loads(block)]


# Every error that the page shows.
@pytest.mark.parametrize("case", REFUSED, ids=[case["error"][:50] for case in REFUSED])
def test_records_that_are_refused(tmp_path: Path, case: dict[str, Any]) -> None:
    (tmp_path / "x.json").write_text(json.dumps([case["record"]]))
    with pytest.raises(DataError) as caught:
        load_records(tmp_path / "x.json")
    assert str(caught.value).startswith(f"{tmp_path / 'x.json'}: record 0")
    assert case["error"] in str(caught.value)


def test_the_reward_of_ones_own(tmp_path: Path) -> None:
    (code,) = blocks("python")
    (tmp_path / "my.py").write_text(code)
    record = Record("1", "What?", "a cup", "free-form")
    texts = ["<answer>a cup</answer>", "<answer>a cup of hot tea</answer>", "a cup"]
    result = combine({f"{tmp_path}/my.py:brief": 0.5, "accuracy": 0.0}, texts, [record] * 3)
    assert result.total.tolist() == [0.5, 0.0, 0.0]
    assert result.unreadable[f"{tmp_path}/my.py:brief"].tolist() == [False, False, True]
