"""The curves of a report: which metrics are drawn together, what each panel is called and how it is read."""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from appo.reports.charts import COLOURS, Series, line_chart, save_row, smoothing_window, stacked_chart, trailing_mean
from appo.reports.markup import key
from appo.reports.runs import Run


@dataclass(frozen=True)
class Line:
    """One metric of a panel; ``names`` are tried in order. label: empty where the panel's title says it."""

    label: str
    names: tuple[str, ...]
    evaluation: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    note: str
    lines: tuple[Line, ...]
    percent: bool = False
    floor: float | None = None
    stacked: bool = False


@dataclass(frozen=True)
class PanelGroup:
    title: str
    lead: str
    panels: tuple[Panel, ...] = field(default=())


def _panel(title: str, note: str, lines: dict[str, str], *, percent: bool = False, floor: float | None = None) -> Panel:
    return Panel(title, note, tuple(Line(label, (name,)) for label, name in lines.items()), percent, floor)


REWARD = _panel("Reward", "Mean over the sampled answers: what the training pushes up.", {"": "reward"})
ENTROPY = _panel(
    "Entropy", "How open each next token is, in nats. Near 0 the model has stopped exploring.", {"": "entropy"}
)
GRADIENT = _panel("Gradient norm", "How strongly the answers pull at the model.", {"": "grad_norm"}, floor=0.0)
PHASES = ("rollout", "score", "update")

GROUPS = (
    PanelGroup(
        "Learning and exploring",
        "Reward should rise while entropy stays above zero.",
        (
            REWARD,
            ENTROPY,
            GRADIENT,
            Panel(
                "Accuracy",
                "Answers in training (line) and to held-out questions (dots).",
                (Line("training", ("accuracy",)), Line("held-out", ("accuracy",), evaluation=True)),
                percent=True,
            ),
            _panel(
                "Groups with no signal",
                "Share of questions whose answers were all equally good, so that there was nothing to compare.",
                {"": "groups/no_signal"},
                percent=True,
                floor=0.0,
            ),
            _panel("Format", "Share of answers in the form that was asked for.", {"": "reward/format"}, percent=True),
        ),
    ),
    PanelGroup(
        "Where the model looked",
        "The frames APPO picked in each group, and the tokens that looked at them.",
        (
            _panel(
                "Picked frames that decide",
                "Precision: of the picked frames, the share from a moment that decides the question.",
                {"picked": "frames/precision", "by chance": "frames/precision_chance"},
                percent=True,
                floor=0.0,
            ),
            _panel(
                "Deciding frames picked",
                "Recall: of the frames that decide the question, the share that was picked.",
                {"picked": "frames/recall", "by chance": "frames/recall_chance"},
                percent=True,
                floor=0.0,
            ),
            _panel("Frames picked", "Target frames per question.", {"": "frames/target"}, floor=0.0),
            _panel(
                "Nothing picked",
                "Share of questions without a target frame; all their tokens count once.",
                {"": "frames/empty"},
                percent=True,
                floor=0.0,
            ),
            _panel(
                "Token weight", "1 is the ordinary weight of GRPO.", {"mean": "weight/mean", "largest": "weight/max"}
            ),
            _panel(
                "Weighted tokens",
                "Share of tokens that count more than once.",
                {"": "weight/share"},
                percent=True,
                floor=0.0,
            ),
            Panel(
                "Attention on the video",
                "Share of a token's attention that goes to the video, not to text.",
                (Line("", ("mass/frames",)),),
                percent=True,
                floor=0.0,
            ),
            _panel(
                "Attention along an answer",
                "The same in the first and in the last quarter of each answer.",
                {"first": "mass/quarter_1", "last": "mass/quarter_4"},
                percent=True,
                floor=0.0,
            ),
            _panel(
                "Attention on deciding frames",
                "Of the attention on the video, the share on frames that decide the question.",
                {"answers": "mass/labelled", "spread evenly": "mass/labelled_chance"},
                percent=True,
                floor=0.0,
            ),
        ),
    ),
    PanelGroup(
        "Answers and step size",
        "How long answers are, and how far one update moves the model.",
        (
            _panel(
                "Answer length",
                "Tokens per answer.",
                {"mean": "length/mean", "longest": "length/max"},
                floor=0.0,
            ),
            _panel(
                "Cut off",
                "Share of answers that hit the length limit.",
                {"": "length/clipped"},
                percent=True,
                floor=0.0,
            ),
            _panel(
                "Clipped tokens",
                "Tokens whose update was cut because the model had moved too far: down, up.",
                {"down": "clip/low", "up": "clip/high"},
                percent=True,
                floor=0.0,
            ),
            _panel(
                "Clipping by weight",
                "The same, within tokens that count more than once and within the others.",
                {"weighted": "clip/weighted", "others": "clip/unweighted"},
                percent=True,
                floor=0.0,
            ),
            _panel("Policy shift", "Approximate KL divergence from the policy that sampled.", {"": "kl/approx"}),
        ),
    ),
    PanelGroup(
        "Where the time goes",
        "Seconds per step, by phase, and memory.",
        (
            Panel(
                "Time per step",
                "Seconds.",
                tuple(Line(phase, (f"time/{phase}",)) for phase in PHASES),
                stacked=True,
                floor=0.0,
            ),
            Panel(
                "Peak memory",
                "GiB, largest so far.",
                (Line("", ("memory/peak_gib",)),),
                floor=0.0,
            ),
        ),
    ),
)


def colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def smoothing(runs: list[Run]) -> int:
    """The window of all lines of a page: that of its longest run."""
    return smoothing_window(max((len(run.metrics) for run in runs), default=1))


def draw(panel: Panel, runs: list[Run]) -> str:
    """The panel as a figure; nothing where no run logged any of its metrics.

    One run: a colour per line. Several: a colour per run, and dashes for a panel's second line.
    """
    if panel.stacked and len(runs) == 1:
        return _draw_stacked(panel, runs[0])
    if panel.stacked:
        panel = Panel(panel.title, panel.note, (Line("", ("time/step",)),), floor=panel.floor)
    series = _series(panel, runs)
    if not series:
        return ""
    legend = ""
    if len(panel.lines) > 1:
        if len(runs) == 1:
            legend = key([(line.label, line.colour, line.dashed) for line in series if line.label])
        else:
            lined = [line for line in panel.lines if not line.evaluation]
            legend = key([(line.label, "#5f6b7a", i > 0) for i, line in enumerate(lined)]) if len(lined) > 1 else ""
    window = smoothing(runs)
    return _figure(panel, legend, line_chart(series, window=window, percent=panel.percent, floor=panel.floor))


def save_overview(runs: list[Run], path: Path) -> None:
    """Entropy, gradient norm and reward of all runs in one picture (the paper's Figure 5); none before the first."""
    chosen = []
    for panel in (ENTROPY, GRADIENT, REWARD):
        series = _series(panel, runs)
        if series:
            options = {"window": smoothing(runs), "percent": panel.percent, "floor": panel.floor}
            chosen.append((panel.title, series, options))
    if chosen:
        save_row(chosen, path)


def _series(panel: Panel, runs: list[Run]) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        for index, line in enumerate(panel.lines):
            if line.evaluation:
                steps, values = run.evaluation_series(line.names[0])
            else:
                steps, values = run.series(*line.names)
            if steps:
                tone = colour(number if len(runs) > 1 else index)
                label = run.label if len(runs) > 1 else line.label
                dashed = len(runs) > 1 and index > 0
                found.append(Series(label, tone, steps, values, dashed, marked=line.evaluation))
    return found


def _draw_stacked(panel: Panel, run: Run) -> str:
    layers: list[tuple[str, str, list[float]]] = []
    steps: list[int] = []
    for line in panel.lines:
        own, values = run.series(*line.names)
        if own and (not steps or own == steps):  # a phase that some steps lack cannot be stacked
            steps = own
            tone = COLOURS[len(layers) % len(COLOURS)]
            layers.append((line.label, tone, trailing_mean(values, smoothing([run]))))
    if not layers:
        return ""
    legend = key([(label, tone, False) for label, tone, _ in layers])
    return _figure(panel, legend, stacked_chart(steps, layers))


def _figure(panel: Panel, legend: str, uri: str) -> str:
    return (
        f'<figure class="card chart"><h3>{escape(panel.title)}</h3><p>{escape(panel.note)}</p>{legend}'
        f'<img src="{uri}" alt="{escape(panel.title)} over training steps"></figure>'
    )
