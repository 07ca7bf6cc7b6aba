"""The pages as a browser shows them: no complaints in its console, everything drawn, pointing at a word works."""

import base64
import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from page_inputs import ATTACKS, RUN, hostile_inspection, inspection, write_hostile_run, write_run
from PIL import Image

from appo.reports.attention_map import write_inspection
from appo.reports.run_report import write_report

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page: the document after its scripts ran, and what they wrote to the console."""

    dom: str
    console: list[str]


def browser() -> str:
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.fail(f"no browser: none of {', '.join(NAMES)} is installed. On Debian: apt-get install chromium")


def run_browser(page: str, profile: Path, *options: str) -> subprocess.CompletedProcess:
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")
    # Virtual time lets the page finish its work before it is looked at, however slow the machine is.
    timing = ("--virtual-time-budget=5000", "--enable-logging=stderr", f"--user-data-dir={profile}")
    done = subprocess.run(
        [browser(), *fixed, *timing, *options, page], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def look(page: Path, profile: Path, *, fragment: str = "", script: str = "") -> Seen:
    """Open a page, with a script at its end that does what a person would."""
    if script:
        page = with_script(page, script)
    done = run_browser(page.as_uri() + fragment, profile, "--dump-dom")
    return Seen(done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line])


def with_script(page: Path, script: str) -> Path:
    """A copy of a page that runs ``script`` as well: its policy names the script by hash, as it does the page's own."""
    acted = page.with_name("acted.html")
    text = page.read_text()
    assert text.count("</body>") == 1
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    text = re.sub(r"script-src ('none'|('sha256-[^']*'))", rf"script-src \2 {allowed}", text)
    acted.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    return acted


def screenshot(page: Path, profile: Path, *, fragment: str = "", size: str = "1280,1600") -> np.ndarray:
    target = page.with_suffix(".shot.png")
    run_browser(page.as_uri() + fragment, profile, f"--window-size={size}", f"--screenshot={target}")
    return np.asarray(Image.open(target).convert("RGB"))


# Every picture that a page carries must decode: a broken one has no width.
COUNT_BROKEN = "document.body.dataset.broken = [...document.images].filter(i => i.naturalWidth === 0).length"
AFTER_LOAD = f"addEventListener('load', () => {{ {COUNT_BROKEN} }})"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / name, method=name, seed=seed) for seed, name in enumerate(("appo", "grpo", "dapo"))]
    write_inspection(runs[0] / "inspect" / "clip", **inspection())
    write_report(runs[:1], folder / "one" / "report.html")
    write_report(runs, folder / "three" / "report.html")
    write_inspection(folder / "inspection", **inspection())
    return folder


def test_the_console_is_read(tmp_path: Path) -> None:
    """Without this, a browser that stopped logging would pass every test below."""
    page = tmp_path / "broken.html"
    page.write_text(
        "<!doctype html><body><script>missing.function()</script><img src='http://127.0.0.1:9/x.png'></body>"
    )
    seen = look(page, tmp_path / "profile", script=AFTER_LOAD)
    assert any("missing is not defined" in line for line in seen.console)
    assert 'data-broken="1"' in seen.dom


# A run alone, several side by side, and an inspected clip.
@pytest.mark.parametrize("name", ["one/report.html", "three/report.html", "inspection/inspection.html"])
def test_pages_open_without_complaint_and_ask_nobody_for_anything(pages: Path, tmp_path: Path, name: str) -> None:
    page = pages / name
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page.read_text())
    seen = look(page, tmp_path, script=AFTER_LOAD)
    assert seen.console == []
    assert 'data-broken="0"' in seen.dom


def test_report_of_one_run(pages: Path, tmp_path: Path) -> None:
    dom = look(pages / "one/report.html", tmp_path).dom
    for heading in ("What happened here", "One clip up close", "Learning and exploring", "Where the model looked"):
        assert f"<h2>{heading}</h2>" in dom
    assert dom.count("<figure") >= 15
    assert "to step 40" in dom
    assert dom.count('class="token"') > 100


def test_report_of_three_runs(pages: Path, tmp_path: Path) -> None:
    dom = look(pages / "three/report.html", tmp_path).dom
    assert "<h2>Results</h2>" in dom
    assert all(f"<td>{method}</td>" in dom for method in ("APPO", "GRPO", "DAPO"))


def test_inspection_draws_every_word_and_frame(pages: Path, tmp_path: Path) -> None:
    inputs = inspection()
    dom = look(pages / "inspection/inspection.html", tmp_path).dom
    words, frames = len(inputs["tokens"][0]), len(inputs["times"])
    assert dom.count('<div class="row"') == words
    assert dom.count('class="cell"') == words * frames
    assert len(re.findall(r'<div class="frame( pick)?">', dom)) == frames
    assert dom.count('class="frame pick"') == 2
    assert dom.count('class="truth yes"') == 2
    assert "The answer as a whole looks most at" in dom


def test_pointing_at_a_word_shows_where_it_looks(pages: Path, tmp_path: Path) -> None:
    inputs = inspection()
    word = inputs["tokens"][0].index("green")
    hover = "new MouseEvent('mouseover', {bubbles: true})"
    script = f"document.querySelector('#speech [data-token=\"{word}\"]').dispatchEvent({hover})"
    dom = look(pages / "inspection/inspection.html", tmp_path, script=script).dom
    share = inputs["mass"][0, word] / inputs["mass"][0, word].sum()
    first = inputs["times"][int(share.argmax())][0]
    assert f"“green” looks most at {first:.1f}-" in dom
    assert f"({round(100 * float(share.max()))}% of what it gives to the clip)" in dom
    counts = re.search(r"it counts ([\d.]+) times in training", dom)
    assert counts
    assert float(counts[1]) == pytest.approx(float(inputs["weights"][0, word]), abs=0.0056)  # shown with two decimals
    heights = [float(height) for height in re.findall(r'<div class="look"[^>]*><i style="height: ([\d.]+)%', dom)]
    assert np.argmax(heights) == int(share.argmax())
    assert np.allclose(heights, 100 * (share / share.max()).numpy(), atol=0.5)
    assert len(re.findall(r'class="(?:token|row) on"', dom)) == 2


def test_tabs_and_links_choose_the_answer(pages: Path, tmp_path: Path) -> None:
    page = pages / "inspection/inspection.html"
    clicked = look(page, tmp_path, script="document.querySelectorAll('.tabs button')[1].click()").dom
    assert re.search(r'<div class="word"[^>]*>blue</div>', clicked)
    linked = look(page, tmp_path, fragment="#answer=2&word=12").dom
    assert "“blue” looks most at" in linked


def test_screenshots_are_not_blank(pages: Path, tmp_path: Path) -> None:
    report = screenshot(pages / "one/report.html", tmp_path)
    assert report.shape[:2] == (1600, 1280)
    dark = report.max(axis=2) < 110
    assert dark[:130].any(), "no heading"
    assert 0.005 < dark.mean() < 0.4
    assert len(np.unique(report.reshape(-1, 3), axis=0)) > 200
    shown = screenshot(pages / "inspection/inspection.html", tmp_path, fragment="#word=12")
    red, green, blue = (shown[..., channel].astype(int) for channel in range(3))
    assert ((blue > red + 80) & (blue > green + 60)).mean() > 0.005, "no cells of the heat map"
    assert ((red > 200) & (green > 80) & (green < 200) & (blue < 120)).sum() > 500, "no picked frames, no weights"


def test_no_picture_runs_out_of_a_narrow_window(pages: Path, tmp_path: Path) -> None:
    script = "document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth + 1"
    for name in ("one/report.html", "inspection/inspection.html"):
        dom = run_browser(
            with_script(pages / name, script).as_uri(), tmp_path, "--window-size=700,900", "--dump-dom"
        ).stdout
        assert 'data-wide="false"' in dom, name


# Every way in which text of a run could become markup or a script.
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_a_run_folder_says_runs(tmp_path: Path, attack: str) -> None:
    """Texts that are scripts, in every place a run folder has for text: no script runs, none is even refused."""
    run = write_hostile_run(tmp_path / "run", attack)
    write_inspection(run / "inspect" / "clip", **hostile_inspection(attack))
    for page in (write_report([run], tmp_path / "report.html"), run / "inspect" / "clip" / "inspection.html"):
        seen = look(page, tmp_path / "profile")
        assert "data-attacked" not in seen.dom
        assert seen.console == []


def test_the_policy_stops_a_script_that_was_planted(pages: Path, tmp_path: Path) -> None:
    """Were a text ever to become markup, it would still not run."""
    for name in ("one/report.html", "inspection/inspection.html"):
        planted = (pages / name).with_name("planted.html")
        attack = f"<script>{RUN}</script><img src=x onerror='{RUN}'><a id=x href='javascript:{RUN}'>x</a>"
        planted.write_text((pages / name).read_text().replace("</body>", attack + "</body>"))
        seen = look(planted, tmp_path / "profile")
        assert "data-attacked" not in seen.dom
        assert any("Content Security Policy" in line for line in seen.console)


def test_cells_that_are_no_numbers_stay_empty(tmp_path: Path) -> None:
    _, page = write_inspection(tmp_path, **hostile_inspection("plain"))
    seen = look(page, tmp_path / "profile")
    assert seen.console == []
    assert len(re.findall(r'class="cell"', seen.dom)) == 8 * len(inspection()["tokens"][0])
    assert seen.dom.count('title="not a number"') == 1
    assert re.search(r'<div class="weight">not a number', seen.dom)
