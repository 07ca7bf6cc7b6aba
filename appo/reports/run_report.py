"""The page of one or several runs: what happened in plain words, the curves, and responses with their token weights."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from appo.reports import panels
from appo.reports.markup import key, png_uri, section, tile, write_page
from appo.reports.responses import draw_samples
from appo.reports.runs import ReportError, Run, is_number, read_runs
from appo.reports.story import at_work, explanation

__all__ = ["ReportError", "write_report"]

MISSING = "&ndash;"


def write_report(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Write one self-contained page about training runs, and a PNG of entropy, gradient norm and reward beside it.

    A run may still be going, and may lack any metric: what there is no data for, or no sound data, is left out. Run
    folders may come from anywhere: nothing in them can run in the page.

    Args:
        runs: run folders (``output`` of a training run); several are drawn side by side, as in the paper's Figure 5.
        output: the page, .html. The picture has its name with .png.

    Returns:
        The path of the page.

    Raises:
        ReportError: a folder that is not a run, or a file in it that does not parse.
    """
    found, output = read_runs(runs), Path(output)
    several = len(found) > 1
    body = (
        "<main>"
        + _head(found)
        + (_comparison(found) if several else _tiles(found[0]))
        + explanation(found)
        + "".join(at_work(run, several=several) for run in found)
        + "".join(_closeup(run, output, several) for run in found)
        + _curves(found)
        + _tasks(found)
        + "".join(draw_samples(run, several) for run in found)
        + _settings(found)
        + "<footer>The method: attention-guided perception policy optimisation, arXiv 2602.23823. "
        "Every number on this page comes from the files of the run folder.</footer></main>"
    )
    write_page(output, title="APPO: " + ", ".join(run.label for run in found), body=body)
    panels.save_overview(found, output.with_suffix(".png"))
    return output


def _head(runs: list[Run]) -> str:
    if len(runs) > 1:
        title = f"{len(runs)} training runs side by side"
        about = "; ".join(f"{run.label}: {_progress(run)}" for run in runs)
    else:
        title = f"{escape(runs[0].method or 'Training')} run <span>{escape(runs[0].label)}</span>"
        about = _progress(runs[0])
        if runs[0].config.get("data"):
            about += f". Trained on {Path(str(runs[0].config['data'])).name}"
    return f"<header><h1>{title}</h1><p>{escape(about[:1].upper() + about[1:])}.</p></header>"


def _progress(run: Run) -> str:
    total = run.max_steps
    if not run.metrics:
        return "no step finished yet"
    if total is None:
        return f"{run.step} steps"
    return f"all {total} steps done" if run.finished else f"step {run.step} of {total}, not finished"


def _tiles(run: Run) -> str:
    tiles = [_accuracy_tile(run, split, first=split == run.splits[0]) for split in run.splits]
    reward = run.series("reward")[1]
    if reward:
        window = panels.smoothing([run])
        first, last = sum(reward[:window]) / window, sum(reward[-window:]) / window
        steps_named = f"the first and last {window} steps" if window > 1 else "the first and last step"
        value = f'<span class="from">{first:.2f} →</span> {last:.2f}'
        tiles.append(tile("Training reward", value, f"Sampled answers; mean of {steps_named}."))
    for name, metric, form, note in TILES:
        number = run.last(*metric)
        if number is not None:
            memory = run.last("memory/peak_gib", window=1)
            if metric == ("time/step",) and memory is not None:
                note = f"Peak memory so far: {memory:.2f} GiB."
            tiles.append(tile(name, form.format(number), note))
    note = '<p class="frames">Shares and times are means of the last 10 steps.</p>'
    return f'<div class="tiles">{"".join(tiles)}</div>{note}' if tiles else ""


def _accuracy_tile(run: Run, split: str, *, first: bool) -> str:
    """Held-out accuracy before and after; the first split is the headline."""
    steps, values = run.evaluation_series("accuracy", split)
    if not values:
        return ""
    name = "Held-out accuracy" + (f", {split}" if split and split != "eval" else "")
    if len(values) == 1:
        return tile(name, f"{values[0]:.0%}", f"At step {steps[0]}.", strong=first)
    gain = f"{100 * (values[-1] - values[0]):+.0f} points"
    count = run.of_split(split)[0].get("records")
    questions = f" {count:.0f} questions the model was not trained on." if is_number(count) and count else ""
    samples = run.config.get("eval_samples", 0)
    how = f"mean of {samples} sampled answers" if samples else "greedy answers"
    note = f"{gain} from step {steps[0]} (before training) to step {steps[-1]}, {how}.{questions}"
    if steps[0] > 0:
        note = note.replace(" (before training)", "")
    value = f'<span class="from">{values[0]:.0%} →</span> {values[-1]:.0%}'
    return tile(name, value, note if first else f"{gain}.", strong=first)


TILES = (
    ("Questions without signal", ("groups/no_signal",), "{:.0%}", "All their answers were equally good."),
    ("Time per step", ("time/step",), "{:.2f} s", "Rollout, scoring, update."),
    (
        "Speed of a process",
        ("time/tokens_per_second",),
        "{:,.0f} tokens/s",
        "Prompts, each once a group, and responses.",
    ),
)


OF_THE_MACHINE = ("output", "data_root", "frame_cache", "engine_urls", "engine_token", "vllm_python")
COLUMNS = (
    ("Entropy", ("entropy",), "{:.2f}"),
    ("Gradient norm", ("grad_norm",), "{:.2f}"),
    ("Reward", ("reward",), "{:.2f}"),
    ("Weight > 1", ("weight/share",), "{:.0%}"),
    ("Picks that decide", ("frames/precision",), "{:.0%}"),
    ("No signal", ("groups/no_signal",), "{:.0%}"),
    ("s / step", ("time/step",), "{:.2f}"),
    ("Tokens / s and GPU", ("time/tokens_per_second",), "{:,.0f}"),
    ("Rollout", ("time/share/rollout",), "{:.0%}"),
    ("Padding", ("padding",), "{:.0%}"),
)


def _comparison(runs: list[Run]) -> str:
    """A row per run; the columns that no run has are left out."""
    columns = [column for column in COLUMNS if any(run.last(*column[1]) is not None for run in runs)]
    splits = list(dict.fromkeys(split for run in runs for split in run.splits))
    names = [f"Held-out accuracy{f', {split}' if split and split != 'eval' else ''}" for split in splits]
    heads = ["Run", "Method", "Steps", *(head for name in names for head in (name, "Gain")), *(c[0] for c in columns)]
    rows = []
    for run in runs:
        cells = [escape(run.label), escape(run.method) or MISSING, str(run.step)]
        for split in splits:
            values = run.evaluation_series("accuracy", split)[1]
            cells.append(f"{values[0]:.0%} → <b>{values[-1]:.0%}</b>" if values else MISSING)
            cells.append(f"{100 * (values[-1] - values[0]):+.0f} points" if len(values) > 1 else MISSING)
        for _, metric, form in columns:
            value = run.last(*metric)
            cells.append(MISSING if value is None else form.format(value))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    table = f'<div class="card table"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    lead = (
        "Entropy and the columns after it are means of the last 10 steps. Runs differ by chance as well: a difference "
        "between two methods counts only when it holds over several seeds."
    )
    return section("Results", lead, table)


def _curves(runs: list[Run]) -> str:
    several = len(runs) > 1
    lines = key([(run.label, panels.colour(i), False) for i, run in enumerate(runs)]) if several else ""
    window = panels.smoothing(runs)
    smoothing = f" Firm lines are means of {window} steps, faint ones the raw values." if window > 1 else ""
    parts: list[str] = []
    for group in panels.GROUPS:
        charts = "".join(panels.draw(panel, runs) for panel in group.panels)
        lead = group.lead + (smoothing if not parts else "")
        parts.append(section(group.title, lead, charts and f'{lines}<div class="charts">{charts}</div>'))
    return "".join(parts)


def _tasks(runs: list[Run]) -> str:
    """Held-out accuracy per kind of question, first evaluation against last."""
    tables = []
    for run in runs:
        split = run.of_split(run.splits[0]) if run.splits else []
        if len(split) < 2:
            continue
        names = [name for name in split[0] if name.startswith("accuracy/")]
        names = [name for name in names if is_number(split[0][name]) and is_number(split[-1].get(name))]
        rows = []
        for name in names:
            before, after = split[0][name], split[-1][name]
            start, end = (min(1.0, max(0.0, share)) for share in (before, after))  # of the bar
            low, high = sorted((start, end))
            bar = (
                f'<span class="bar"><i class="{"gain" if after >= before else "loss"}" style="left:{low:.1%};'
                f'right:{1 - high:.1%}"></i><i class="dot" style="left:{start:.1%}"></i>'
                f'<i class="dot now" style="left:{end:.1%}"></i></span>'
            )
            rows.append(
                f"<tr><td>{escape(name.removeprefix('accuracy/'))}</td><td>{before:.0%}</td><td class='left'>{bar}</td>"
                f"<td><b>{after:.0%}</b></td><td>{100 * (after - before):+.0f} points</td></tr>"
            )
        if rows:
            head = (
                f"<tr><th>{escape(run.label) if len(runs) > 1 else 'Question'}</th><th>before</th><th></th><th>now</th>"
            )
            tables.append(f'<div class="card table"><table>{head}<th></th></tr>{"".join(rows)}</table></div><br>')
    lead = "Held-out accuracy at the first evaluation (grey) and at the last (blue)."
    return section("By kind of question", lead, "".join(tables))


def _closeup(run: Run, output: Path, several: bool) -> str:
    """The picture of the first inspection that the run folder holds, with links to the pages of all."""
    # A link out of the folder would bring any file of this machine into the page.
    inside = run.folder.resolve()
    found = sorted(run.folder.glob("inspect*/**/inspection.png"))
    pictures = {path: uri for path in found if path.resolve().is_relative_to(inside) and (uri := png_uri(path))}
    if not pictures:
        return ""
    pages = [os.path.relpath(path.with_suffix(".html"), output.parent) for path in pictures]
    # Quoted, a name with a colon is no scheme such as javascript:
    links = ", ".join(f'<a href="{escape(quote(page))}">clip {number}</a>' for number, page in enumerate(pages, 1))
    path, picture = next(iter(pictures.items()))
    image = f'<img class="wide" src="{picture}" alt="Attention of each word to each frame of one clip">'
    lead = (
        "Rows are words, columns are moments of the clip, dark is where the model looked while saying the word. "
        "Orange frames were picked, green bars mark the moments that decide the question, bars on the right are token "
        "weights. "
        f"Open it to point at words: {links}."
    )
    name = f"One clip of {run.label} up close" if several else "One clip up close"
    # A folder may say of when it is: inspect-before-training.
    _, _, moment = path.relative_to(run.folder).parts[0].partition("-")
    return section(
        name + (f", {moment.replace('-', ' ')}" if moment else ""), lead, f'<div class="card viewer">{image}</div>'
    )


def _differences(runs: list[Run]) -> str:
    """The settings in which runs differ, a row each; those of machine and folders are left out."""
    names = list(dict.fromkeys(name for run in runs for name in run.config if name not in OF_THE_MACHINE))
    differ = [name for name in names if len({repr(run.config.get(name)) for run in runs if run.config}) > 1]
    if len(runs) < 2 or not differ:
        return ""
    head = "".join(f"<th>{escape(label)}</th>" for label in ("Setting", *(run.label for run in runs)))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{escape(str(run.config[name])) if name in run.config else MISSING}</td>" for run in runs)
        + "</tr>"
        for name in differ
    )
    return f'<div class="card table"><table><tr>{head}</tr>{rows}</table></div>'


def _settings(runs: list[Run]) -> str:
    blocks = []
    for run in runs:
        path = run.folder / "config.yaml"
        if run.config:
            text = escape(path.read_text(encoding="utf-8"))
            blocks.append(
                f'<details class="card sample"><summary>{escape(run.label)}<span>config.yaml</span></summary>'
                f"<pre>{text}</pre></details>"
            )
    several = "What runs were started with: first where they differ." if len(runs) > 1 else ""
    return section("Settings", several or "What the run was started with.", _differences(runs) + "".join(blocks))
