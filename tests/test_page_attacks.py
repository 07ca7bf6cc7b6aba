"""Pages of run folders that come from strangers: nothing in them becomes markup, and nothing stops the page."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from page_inputs import ATTACKS, hostile_inspection, inspection, write_hostile_run, write_small_run

from appo.reports.attention_map import write_inspection
from appo.reports.run_report import ReportError, write_report

ELEMENTS = {
    "html", "head", "meta", "title", "link", "style", "body", "main", "header", "footer", "section", "div", "span", "p",
    "h1", "h2", "h3", "b", "i", "br", "em", "ol", "ul", "li", "a", "img", "figure", "table", "tr", "th", "td",
    "details", "summary", "pre", "button", "script",
}  # fmt: skip
STYLE = re.compile(r"[-a-z0-9#%.,:; ()]*")


class Reader(HTMLParser):
    """Collects the elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:50]}")


def assert_inert(page: Path, scripts: int) -> None:
    """Only elements that our pages have, no handler, no link to anywhere but a file beside the page, no other style."""
    elements = Reader(page).elements
    assert {tag for tag, _ in elements} <= ELEMENTS
    assert sum(tag == "script" and "type" not in attributes for tag, attributes in elements) == scripts
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("srcdoc", "formaction")], tag
        assert STYLE.fullmatch(attributes.get("style") or "")
        for name in ("href", "src"):
            target = attributes.get(name) or ""
            assert target.startswith("data:image/") or re.fullmatch(r"[^:]*", target)
    policy = [a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1 and policy[0]
    allowed = re.search(r"script-src ([^;]*)", policy[0])
    assert allowed and re.fullmatch(r"'none'" if not scripts else r"'sha256-[\w+/=]{44}'", allowed[1])


@pytest.mark.parametrize("attack", ATTACKS)
def test_texts_of_a_run_stay_text(tmp_path: Path, attack: str) -> None:
    run = write_hostile_run(tmp_path / "run", attack)
    page = write_report([run], tmp_path / "report.html")
    assert_inert(page, scripts=0)
    other = write_hostile_run(tmp_path / ("b" + attack.replace("/", "").replace("\ud83c\udfc3", "x")[:80]), attack)
    assert_inert(write_report([run, other], tmp_path / "both.html"), scripts=0)


@pytest.mark.parametrize("attack", ATTACKS)
def test_texts_of_an_inspection_stay_text(tmp_path: Path, attack: str) -> None:
    picture, page = write_inspection(tmp_path, **hostile_inspection(attack))
    assert picture.is_file()
    assert_inert(page, scripts=1)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    data = json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["responses"][0]["mass"][2][3] is None and data["responses"][0]["weights"][1] is None
    assert data["responses"][3]["mass"][0][0] is not None and data["top"] < 3


def test_links_lead_to_files_beside_the_page_whatever_they_are_called(tmp_path: Path) -> None:
    run = write_small_run(tmp_path / "javascript:alert(1)", steps=2)
    write_inspection(run / "inspect" / 'a" onclick="b', **inspection())
    assert_inert(write_report([run], tmp_path / "report.html"), scripts=0)


def test_files_from_outside_and_files_that_are_no_pictures_are_not_shown(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    write_inspection(tmp_path / "other", **inspection())
    os.rename(tmp_path / "other" / "inspection.png", secret)
    run = write_small_run(tmp_path / "run", steps=2)
    for name in ("a", "b"):
        (run / "inspect" / name).mkdir(parents=True)
    (run / "inspect" / "a" / "inspection.png").symlink_to(secret)
    (run / "inspect" / "b" / "inspection.png").write_bytes(b"<script>alert(1)</script>")
    assert "One clip up close" not in write_report([run], tmp_path / "report.html").read_text()


# A line that JSON readers choke on, or whose step has no place on an axis; the last line may always be half a line.
@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"step": ' + "9" * 5000 + "}",
        '{"step": 1e400}',
        '{"step": -1}',
        '{"step": true}',
        '{"step": "1"}',
        "\x00",
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, line: str) -> None:
    run = write_small_run(tmp_path / "run", steps=3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(line + '\n{"step": 9, "reward": 1}\n')
    with pytest.raises(ReportError, match=r"metrics.jsonl: line 4: expected"):
        write_report([run], tmp_path / "report.html")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    run = write_small_run(tmp_path / "run", steps=3)
    with open(run / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 9, "question": "\xff\xfe"}\n{"step": 10, "quest')
    assert_inert(write_report([run], tmp_path / "report.html"), scripts=0)


# Each file of a run folder may be missing: a run that died early, or was copied in part.
@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl"])
def test_a_run_folder_with_one_file(tmp_path: Path, kept: str) -> None:
    run = write_hostile_run(tmp_path / "run", ATTACKS[0])
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    assert_inert(write_report([run], tmp_path / "report.html"), scripts=0)


def test_settings_of_a_run_read_nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPO_SECRET", "swordfish")
    run = write_small_run(tmp_path / "run", steps=2)
    (run / "config.yaml").write_text("data: ${oc.env:APPO_SECRET}\nrewards: {a: 1, b: 2}\n")
    assert "swordfish" not in write_report([run], tmp_path / "report.html").read_text()
