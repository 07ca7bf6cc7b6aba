"""Groups of responses on a report: the lines of samples.jsonl, cleaned, and drawn word by word.

A run folder may come from anywhere, and may have been cut off while it was written: what is not of the expected type is
left out, and every text is escaped where it enters the page.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from appo.reports.markup import answer_class, section, token_spans, verdict, weight_scale
from appo.reports.runs import Run

SHOWN_SAMPLES = 6  # groups of responses on the page, spread over the run


@dataclass(frozen=True)
class Response:
    """One response of a sample. weights: one for each token, NaN where it is no number; None where there are none."""

    tokens: list[str]
    weights: list[float] | None
    accuracy: float
    reward: float | None
    frames: list[int] | None  # None where the run picked none, since it does not look at frames

    @classmethod
    def read(cls, line: Any) -> "Response":
        line = line if isinstance(line, Mapping) else {}
        tokens = [text(token) for token in _list(line.get("tokens"))]
        weights = [number(weight) for weight in _list(line.get("weights"))]
        reward = number(line.get("reward"))
        return cls(
            tokens=tokens or [text(line.get("text", ""))],
            weights=weights if tokens and len(weights) == len(tokens) else None,
            accuracy=number(line.get("accuracy", 0)),
            reward=None if math.isnan(reward) else reward,
            frames=None if line.get("frames") is None else indices(line["frames"]),
        )


def text(value: Any) -> str:
    """A JSON value as text of moderate length."""
    shown = value if isinstance(value, str) else "" if value is None else repr(value)
    return shown[:100_000]


def number(value: Any) -> float:
    """A JSON value as a finite number, NaN where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        return math.nan
    return float(value)


def indices(values: Any) -> list[int]:
    """The whole numbers from 0 of a JSON list."""
    return [value for value in _list(values) if isinstance(value, int) and not isinstance(value, bool) and value >= 0]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def draw_samples(run: Run, several: bool) -> str:
    """Some groups of responses, the first and the last among them, with tokens tinted by weight."""
    count = min(SHOWN_SAMPLES, len(run.samples))
    places = sorted({round(i * (len(run.samples) - 1) / max(1, count - 1)) for i in range(count)})
    responses = [[Response.read(one) for one in _list(sample.get("completions"))] for sample in run.samples]
    blocks = [_sample(run.samples[place], responses[place], opened=place == places[-1]) for place in places]
    name = f"Responses of {run.label}" if several else "Responses, word by word"
    lead = (
        "One group of answers from some of the steps. The darker a word, the more its token counts in the update. "
        "Point at a word to read its weight."
    )
    if all(response.weights is None for group in responses for response in group):
        lead = "One group of answers from some of the steps. This run gave every token the same weight."
    return section(name, lead, "".join(blocks))


def _sample(sample: Mapping[str, Any], responses: list[Response], *, opened: bool) -> str:
    weights = [weight for response in responses for weight in response.weights or ()]
    top = max((weight for weight in weights if not math.isnan(weight)), default=1.0)
    answer = text(sample.get("answer"))
    options = list_options([text(option) for option in _list(sample.get("options"))], answer)
    right = sum(response.accuracy >= 0.5 for response in responses)
    drawn = "".join(
        f'<div class="response"><div>{verdict(response.accuracy)}'
        f"{'' if response.reward is None else f' reward {response.reward:.2f}'}</div>"
        f"{token_spans(response.tokens, response.weights, top)}</div>"
        for response in responses
    )
    return (
        f'<details class="card sample"{" open" if opened else ""}><summary>Step {int(sample["step"])}'
        f"<span>{right} of {len(responses)} answers right</span></summary><div>"
        f'<p class="question">{escape(text(sample.get("question")))}</p><ul class="options">{options}</ul>'
        f"{_frames(sample, responses)}{weight_scale(top) if weights else ''}{drawn}</div></details>"
    )


def list_options(options: Iterable[str], answer: str) -> str:
    """List items of the options, the right one marked; the answer alone where there are none."""
    shown = list(options) or ([answer] if answer else [])
    return "".join(f"<li{answer_class(option, answer)}>{escape(option)}</li>" for option in shown)


def _frames(sample: Mapping[str, Any], responses: list[Response]) -> str:
    """A line on the frames that were picked in this group, and those of them that decide the question."""
    picked = next((response.frames for response in responses if response.frames is not None), None)
    if picked is None:
        return ""
    deciding = indices(sample.get("labelled_frames"))
    line = f"Frames picked: {', '.join(map(str, picked)) or 'none, so every token counts once'}."
    if deciding:
        hit = len(set(picked) & set(deciding))
        line += f" The question is decided in {', '.join(map(str, deciding))}: {hit} of {len(deciding)} found."
    return f'<p class="frames">{line}</p>'
