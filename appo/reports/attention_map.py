"""The frames that responses to one question looked at: a picture and a page of tokens x frames over thumbnails."""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from appo.reports.heatmap import save_heatmap
from appo.reports.inspection import Inspection
from appo.reports.markup import jpeg_uri, shown, verdict, weight_scale, whole, write_page
from appo.reports.responses import list_options
from appo_kernels import checks

OP = "write_inspection"


def write_inspection(
    output_dir: str | Path,
    *,
    frames: Tensor,
    times: Sequence[tuple[float, float]],
    tokens: Sequence[Sequence[str]],
    mass: Tensor,
    selected: Sequence[int] | Tensor | None,
    weights: Tensor | None,
    rewards: Sequence[float] | Tensor,
    accuracy: Sequence[float] | Tensor | None = None,
    question: str = "",
    options: Sequence[str] = (),
    answer: str = "",
    labelled: Sequence[int] = (),
) -> list[Path]:
    """Write ``inspection.png`` and ``inspection.html`` (self-contained) into ``output_dir`` and return their paths.

    Args:
        frames: (T, 3, H, W) uint8, what the model saw. T is F, or the sampled frames that were merged into F frames;
            those of a frame are then shown above each other.
        times: F pairs (first, last), the seconds that each frame covers.
        tokens: the tokens of each response as text; response i has n_i <= N of them.
        mass: (G, N, F) frame mass, from ``record_frame_mass``; rows past n_i are ignored.
        selected: target frames, from ``select_frames``; None stands for none.
        weights: (G, N) token weights; None stands for ones.
        rewards: (G,). accuracy: (G,), at least 0.5 means right (default: the rewards).
        question, options, answer: what was asked; ``answer`` is an option's letter, or a text.
        labelled: the frames that decide the question, where they are known.

    Raises:
        ValueError: shapes that do not fit together, or a frame index out of range.
    """
    checks.rank(OP, "mass", mass, 3, "(G, N, F)")
    G, N, F = mass.shape
    if not G or not F:
        checks.fail(OP, "mass", "at least one response and one frame", tuple(mass.shape), "Draw a group with a video.")
    checks.rank(OP, "frames", frames, 4, "(T, 3, H, W)")
    checks.dtype(OP, "frames", frames, (torch.uint8,))
    T = frames.shape[0]
    merged = max(1, -(-T // F))  # sampled frames in one frame; the last may have fewer
    if frames.shape[1] != 3 or T < F or -(-T // merged) != F:
        remedy = "Pass one thumbnail per frame, or the sampled frames that were merged."
        checks.fail(OP, "frames", f"{F} or a multiple of RGB pictures (T, 3, H, W)", tuple(frames.shape), remedy)
    _check_length("times", times, F, "frames")
    for name, values in (("tokens", tokens), ("rewards", rewards)):
        _check_length(name, values, G, "responses")
    if accuracy is not None:
        _check_length("accuracy", accuracy, G, "responses")
    if weights is not None:
        checks.shape(OP, "weights", weights, (G, N), "(G, N)", "Pass what token_weights returned.")
    lengths = [len(row) for row in tokens]
    if max(lengths) > N:
        checks.fail(
            OP, "tokens", f"at most N = {N} tokens a response", max(lengths), "Pass the tokens mass was read for."
        )
    picked, deciding = (sorted(map(int, indices)) for indices in (() if selected is None else selected, labelled))
    for name, indices in (("selected", picked), ("labelled", deciding)):
        if any(not 0 <= index < F for index in indices):
            checks.fail(OP, name, f"frames in 0..{F - 1}", indices, "Pass frame indices, not seconds.")

    mass_GNF = mass.detach().float().cpu().numpy()
    weights_GN = np.ones((G, N), np.float32) if weights is None else weights.detach().float().cpu().numpy()
    # Sampled frames that the model sees as one stand above each other; the last one may have to be repeated.
    filled = torch.cat([frames, frames[-1:].expand(F * merged - T, -1, -1, -1)]).cpu()
    pictures = filled.unflatten(0, (F, merged)).permute(0, 1, 3, 4, 2).flatten(1, 2).numpy()
    found = Inspection(
        question=whole(question),
        options=tuple(map(whole, options)),
        answer=whole(answer),
        thumbnails=list(pictures),
        times=[(float(first), float(last)) for first, last in times],
        selected=picked,
        labelled=deciding,
        tokens=[[shown(token) for token in row] for row in tokens],
        mass=[mass_GNF[i, :length] for i, length in enumerate(lengths)],
        weights=[weights_GN[i, :length] for i, length in enumerate(lengths)],
        rewards=[float(reward) for reward in rewards],
        accuracy=[float(value) for value in (rewards if accuracy is None else accuracy)],
    )
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    picture = save_heatmap(found, folder / "inspection.png")
    page = write_page(
        folder / "inspection.html",
        title=f"APPO: {found.question or 'inspection'}",
        body=_body(found),
        script="inspect.js",
    )
    return [picture, page]


def _check_length(name: str, values: Sequence[Any] | Tensor, expected: int, what: str) -> None:
    if len(values) != expected:
        checks.fail(OP, name, f"one entry per {what.removesuffix('s')}, {expected}", len(values), "Pass one for each.")


def _body(found: Inspection) -> str:
    options = list_options(found.options, found.answer)
    right = sum(value >= 0.5 for value in found.accuracy)
    of_them = f", {right} of them right" if found.answer else ""
    tabs = "".join(
        f'<button role="tab" data-response="{i}">Answer {i + 1}{verdict(value)}</button>'
        for i, value in enumerate(found.accuracy)
    )
    truth = (
        '<span><i style="background:var(--truth)"></i>decides the question (known for this clip)</span>'
        if found.labelled
        else ""
    )
    return f"""<main>
<header><h1>{escape(found.question) or "What the answers looked at"}</h1>
<p>{len(found.tokens)} answers to one question about one clip{of_them}. {_selection(found)}</p></header>
<ul class="options" style="margin-top:14px">{options}</ul>
<section style="margin-top:22px"><div class="card viewer">
<div class="tabs" role="tablist" aria-label="Answers">{tabs}</div>
<div class="speech tokens" id="speech" tabindex="0" aria-label="The answer, token by token; arrow keys move"></div>
<p class="readout" id="readout" aria-live="polite"></p>
<div class="bartop">{weight_scale(found.top_weight)}
<div class="switch"><span>Blue cells compare</span><button data-scale="answer">all words</button>
<button data-scale="word">frames within each word</button></div></div>
<p class="range" id="range"></p>
<div class="map"><div class="strip" id="strip"></div><div id="rows"></div></div>
</div>
<p class="legend" style="margin-top:14px">
<span><i style="background:var(--accent)"></i>attention from a word to a frame</span>
<span><i style="background:var(--pick)"></i>frame that APPO picked</span>{truth}
<span><i style="background:#f5a623"></i>how much more than once the word counts in training</span></p></section>
<section><h2>How to read this</h2><p class="lead">Each row is a word of the answer, each column a moment of the clip.
A cell is dark where the model looked at that moment while saying the word: the attention of its last layers, averaged
over heads. The colours run from the lowest value to the highest, so read the two numbers above them: where they are
close, the model looked everywhere alike.
Point at a word to see the moments light up under the thumbnails. The bars on the right are what training
makes of it: words that look at picked moments, and on which the answers disagree, count more than once.</p></section>
</main>
<script type="application/json" id="data">{_data(found)}</script>"""


def _selection(found: Inspection) -> str:
    if not found.selected:
        return "No frame was picked, so every word counts once."
    count = len(found.selected)
    text = f"APPO picked {count} of {len(found.times)} frames."
    if found.labelled:
        hit = len(set(found.selected) & set(found.labelled))
        text += (
            f" {len(found.labelled)} decide the question, and {hit} of these {'was' if hit == 1 else 'were'} picked."
        )
    return text


def _data(found: Inspection) -> str:
    """The data that the page's script draws; "<" is escaped so that no token can end the element."""
    frames = [
        {
            "image": jpeg_uri(picture, side=max(160, 160 * picture.shape[0] // picture.shape[1])),
            "time": (f"video {found.videos[index] + 1}, " if found.videos[-1] else "") + _clock(*found.times[index]),
            "picked": index in found.selected,
            "labelled": index in found.labelled,
        }
        for index, picture in enumerate(found.thumbnails)
    ]
    responses = [
        {
            "tokens": tokens,
            "weights": [_finite(f"{weight:.3f}") for weight in weights],
            "mass": [[_finite(f"{value:.3g}") for value in row] for row in mass],
        }
        for tokens, weights, mass in zip(found.tokens, found.weights, found.mass, strict=True)
    ]
    data = {"frames": frames, "responses": responses, "top": found.top_weight, "truthKnown": bool(found.labelled)}
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _finite(text: str) -> float | None:
    """The number that ``text`` shows; None for what JSON has no number for."""
    value = float(text)
    return value if math.isfinite(value) else None


def _clock(first: float, last: float) -> str:
    return f"{first:.1f} s" if last - first < 0.05 else f"{first:.1f}-{last:.1f} s"
