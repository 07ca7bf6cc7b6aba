"""The method in plain words for a reader who has never met it, with the numbers of the runs at hand."""

from html import escape
from typing import Any, NamedTuple

from appo.reports.markup import section, tile
from appo.reports.runs import Run, is_number

STRATEGIES = {
    "hard": "frames that right answers looked at and wrong answers did not",
    "soft": "frames that right answers looked at",
    "all": "frames that any of the answers looked at most",
    "contrast": "frames that right answers looked at more than wrong ones",
    "common": "frames that the answers looked at most, taken together",
    "peak": "frames that a few words looked at far more than the rest of their answer",
    "released-hard": "frames that right answers looked at",
    "released-soft": "frames that right answers looked at (or any answer, when none was right)",
}


def explanation(runs: list[Run]) -> str:
    """Six steps. Those that make APPO differ from GRPO are in orange, and faint where no run takes them."""
    config = next((run.config for run in runs if run.method == "APPO"), runs[0].config)
    weighted = not config or config.get("method", "appo") == "appo"
    steps = "".join(
        f'<li class="{kind}{"" if kind != "own" or weighted else " idle"}"><b>{title}</b><p>{text}</p></li>'
        for title, text, kind in _steps(config)
    )
    if weighted:
        lead = (
            "A question about a video is answered many times, and what the better answers did is made more likely. "
            "APPO adds a second look (orange): it finds the frames that mattered, and lets the words that were said "
            "while looking at those frames count more."
        )
    else:
        did = "gave all words the same weight" if runs[0].method in ("GRPO", "DAPO") else "took another method's rule"
        lead = (
            "A question about a video is answered many times, and what the better answers did is made more likely. "
            f"This run {did}; the orange steps are what APPO would add."
        )
    note = (
        '<p class="note">Why: models that reason about videos fail more often at <em>seeing</em> than at '
        "<em>reasoning</em>, and one reward for a whole answer does not say which words came from seeing. "
        "One run shows the method at work; whether the weights help is a question for several seeds side by side.</p>"
    )
    return section("What happened here", lead, f'<ol class="steps">{steps}</ol>{note}')


class Figure(NamedTuple):
    """A share of what a run picked, and the share that as many frames drawn at random would have on average."""

    name: str
    value: float
    chance: float | None
    note: str


def picked(run: Run) -> list[Figure]:
    """Figures on the picked frames, as means over all steps; empty for a run that picks nothing, such as GRPO's."""

    def mean(metric: str) -> float | None:
        values = run.series(metric)[1]
        return sum(values) / len(values) if values else None

    empty = mean("frames/empty")
    figures = (
        ("Questions with frames picked", None if empty is None else 1 - empty, None, "In others all words count once."),
        ("Picked frames that decide", mean("frames/precision"), mean("frames/precision_chance"), ""),
        ("Deciding frames picked", mean("frames/recall"), mean("frames/recall_chance"), ""),
        ("Weighted words", mean("weight/share"), None, "Tokens that count more than once."),
    )
    return [Figure(name, value, chance, note) for name, value, chance, note in figures if value is not None]


def at_work(run: Run, *, several: bool) -> str:
    """Tiles on the frames that were picked in this run, against chance."""
    tiles = [
        tile(
            figure.name,
            f"{figure.value:.0%}",
            figure.note if figure.chance is None else f"{figure.chance:.0%} if as many frames were drawn at random.",
        )
        for figure in picked(run)
    ]
    lead = (
        "Means over all steps, of the questions whose answers were not all equally good. A frame decides a question "
        "when it was sampled in a moment that the data names."
    )
    name = f"The method at work in {run.label}" if several else "The method at work"
    return section(name, lead, f'<div class="tiles">{"".join(tiles)}</div>' if tiles else "")


def _steps(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    sizes = {name: f"{value:g}" for name, value in config.items() if is_number(value)}
    answers = f"{sizes['group_size']} times" if "group_size" in sizes else "several times"
    prompts = f" {sizes['prompts_per_step']} questions make one step." if "prompts_per_step" in sizes else ""
    rewards = config.get("rewards")
    weights = {name: scale for name, scale in rewards.items() if is_number(scale)} if isinstance(rewards, dict) else {}
    parts = " + ".join(f"{scale:g} times {escape(str(name))}" for name, scale in weights.items())
    parts = parts if len(weights) > 1 else ""
    picked = STRATEGIES.get(str(config.get("strategy")), STRATEGIES["hard"])
    top_frames = f" (top {sizes['top_frames']} of each answer)" if "top_frames" in sizes else ""
    alpha = float(sizes.get("alpha", 1.7))
    return [
        ("Answer", f"The model watches a clip and answers the same question {answers}, each time a little differently."
         + prompts, ""),
        ("Reward", "Each answer is scored. An answer better than its group's average is to become more likely, a worse "
         f"one less.{f' The score: {parts}.' if parts else ''}", ""),
        ("Look", "For every word, the attention of the model's last layers says how much it looked at each frame of "
         "the clip while saying it.", "own"),
        ("Pick frames", f"Picked are {picked}{top_frames}. None may be left; then all words count alike.", "own"),
        ("Weigh words", "In each answer, take the words that look most at a picked frame, and compare them across "
         f"answers. Where the answers disagree most, the word counts up to {1 + alpha:.3g} times.", "own"),
        ("Update", "The model moves a small step: towards the better answers, away from the worse, harder at the "
         "weighted words. Steps that would move it too far are cut.", ""),
    ]  # fmt: skip
