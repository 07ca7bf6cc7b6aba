"""The kinds of questions: each builds a scene in which one short moment decides the answer."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from appo.tasks.render import COLOURS, SHAPES, WHITE, Moment, Scene, Shape


@dataclass(frozen=True)
class Difficulty:
    """Difficulty of seeing the moment.

    noise: standard deviation of the noise in grey levels. size: smallest and largest radius of the shape that
    matters, in sides. contrast: 0 (nothing shows) to 1 (full colour, full jump). length: seconds the moment
    lasts. distractors: shapes that drift about and do not matter. background: grey level.
    """

    noise: float = 8.0
    size: tuple[float, float] = (0.2, 0.26)
    contrast: float = 1.0
    length: float = 0.5
    distractors: int = 0
    background: float = 45.0


@dataclass(frozen=True)
class Question:
    """A scene and what is asked about it.

    answer: index into ``options``. spans: (start, end) in seconds of each moment that decides it, in the
    order of time. seen: (start, end, word) of what can be seen when, for a kind in which a response first
    says when it looks: what a wrong one has to say depends on where it looked.
    """

    kind: str
    scene: Scene
    problem: str
    options: tuple[str, ...]
    answer: int
    spans: tuple[tuple[float, float], ...]
    seen: tuple[tuple[float, float, str], ...] = ()


NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
MARK = (0.92, 0.12, 0.06)  # height of the mark of "cue", distance between its places, its radius; in sides
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}


def colour(rng: np.random.Generator, level: Difficulty, duration: float, fps: float) -> Question:
    names = tuple(COLOURS)
    answer = int(rng.integers(len(names)))
    spans = _spans(rng, 1, level.length, duration, fps)
    moment = Moment(*spans[0], colour=COLOURS[names[answer]], strength=level.contrast)
    scene = _scene(rng, level, [_shape(rng, level, moments=(moment,))])
    return Question("colour", scene, "Which colour is the flash?", names, answer, spans)


def order(rng: np.random.Generator, level: Difficulty, duration: float, fps: float) -> Question:
    names = tuple(COLOURS)
    first, second = (int(i) for i in rng.choice(len(names), 2, replace=False))
    spans = _spans(rng, 2, level.length, duration, fps)
    moments = tuple(
        Moment(*span, colour=COLOURS[names[which]], strength=level.contrast)
        for span, which in zip(spans, (first, second), strict=True)
    )
    scene = _scene(rng, level, [_shape(rng, level, moments=moments)])
    return Question("order", scene, "Which colour comes first?", names, first, spans)


def count(rng: np.random.Generator, level: Difficulty, duration: float, fps: float) -> Question:
    options = NUMBERS[:4]
    answer = int(rng.integers(len(options)))
    # Four moments have to fit with gaps between them.
    spans = _spans(rng, answer + 1, min(level.length, duration / 8), duration, fps)
    moments = tuple(Moment(*span, colour=WHITE, strength=level.contrast) for span in spans)
    scene = _scene(rng, level, [_shape(rng, level, moments=moments)])
    return Question("count", scene, "How many flashes are there?", options, answer, spans)


def direction(rng: np.random.Generator, level: Difficulty, duration: float, fps: float) -> Question:
    options = tuple(DIRECTIONS)
    answer = int(rng.integers(len(options)))
    spans = _spans(rng, 1, level.length, duration, fps)
    reach = 0.28 * level.contrast
    offset = DIRECTIONS[options[answer]]
    moment = Moment(*spans[0], offset=(reach * offset[0], reach * offset[1]))
    scene = _scene(rng, level, [_shape(rng, level, moments=(moment,), spread=0.05)])
    return Question("direction", scene, "Which way is the jump?", options, answer, spans)


def blink(rng: np.random.Generator, level: Difficulty, duration: float, fps: float) -> Question:
    options = ("left", "right", "both")
    answer = int(rng.integers(len(options)))
    spans = _spans(rng, 1, level.length, duration, fps)
    background = (int(level.background),) * 3
    gone = (Moment(*spans[0], colour=background, strength=level.contrast),)
    shapes = [
        _shape(
            rng, level, around=(0.5, 0.25), spread=0.03, moments=gone if options[answer] in ("left", "both") else ()
        ),
        _shape(
            rng, level, around=(0.5, 0.75), spread=0.03, moments=gone if options[answer] in ("right", "both") else ()
        ),
    ]
    scene = _scene(rng, level, shapes)
    return Question("blink", scene, "Which object is the blink?", options, answer, spans)


def cue(rng: np.random.Generator, level: Difficulty, duration: float, fps: float) -> Question:
    """A shape takes each colour in turn, plain to see. A mark below it, all the time, says which time is meant.

    The mark's place from left to right is the place in time, and that is what is hard to see. Whoever misreads it
    looks at another time, and reports the colour that is shown then. ``length`` does not matter.
    """
    names, total = tuple(COLOURS), round(duration * fps)
    count = len(names)
    edges = [round(total * time / count) / fps for time in range(count + 1)]
    times, shown = list(itertools.pairwise(edges)), rng.permutation(count).tolist()
    where = int(rng.integers(count))
    moments = tuple(Moment(*time, colour=COLOURS[names[which]]) for time, which in zip(times, shown, strict=True))
    shape = _shape(rng, level, moments=moments, around=(0.4, 0.5), spread=0.08)
    light = (round(level.background + level.contrast * (WHITE[0] - level.background)),) * 3
    place = (MARK[0], 0.5 + MARK[1] * (where - (count - 1) / 2))
    mark = Shape(SHAPES[1], place, MARK[2], moments=(Moment(0.0, duration, colour=light),))
    seen = tuple((*time, names[which]) for time, which in zip(times, shown, strict=True))
    return Question(
        "cue", _scene(rng, level, [shape, mark]), "Which colour is at the cue?", names, shown[where],
        (times[where],), seen,
    )  # fmt: skip


KINDS: dict[str, Callable[[np.random.Generator, Difficulty, float, float], Question]] = {
    "colour": colour,
    "order": order,
    "count": count,
    "direction": direction,
    "blink": blink,
    "cue": cue,
}


def _shape(
    rng: np.random.Generator,
    level: Difficulty,
    *,
    moments: tuple[Moment, ...],
    around: tuple[float, float] = (0.5, 0.5),
    spread: float = 0.15,
) -> Shape:
    down, across = rng.uniform(-spread, spread, 2)
    kind = SHAPES[int(rng.integers(len(SHAPES)))]
    radius = float(rng.uniform(*level.size))
    return Shape(kind, (around[0] + float(down), around[1] + float(across)), radius, moments=moments)


def _scene(rng: np.random.Generator, level: Difficulty, shapes: list[Shape]) -> Scene:
    others = []
    for _ in range(level.distractors):
        start, drift = rng.uniform(0.1, 0.9, 2), rng.uniform(-0.12, 0.12, 2)
        kind = SHAPES[int(rng.integers(len(SHAPES)))]
        others.append(Shape(kind, tuple(start.tolist()), float(rng.uniform(0.05, 0.09)), tuple(drift.tolist())))
    # The shape that matters is on top: a distractor must not hide the moment.
    return Scene(tuple(others + shapes), background=level.background, noise=level.noise)


def _spans(
    rng: np.random.Generator, number: int, length: float, duration: float, fps: float
) -> tuple[tuple[float, float], ...]:
    """``number`` moments of ``length`` seconds on frame boundaries, in order, at least ``length`` apart."""
    frames, total = max(round(length * fps), 1), round(duration * fps)
    slack = total - frames * (2 * number - 1)
    if slack < 0:
        raise ValueError(
            f"make_task: `length`: expected at most {duration / (2 * number - 1):.3g} s, so that {number} moments fit "
            f"into a clip of {duration:g} s, got {length:g} s. Shorten the moments or lengthen the clips."
        )
    starts = np.sort(rng.integers(0, slack + 1, number)) + 2 * frames * np.arange(number)
    return tuple((int(start) / fps, int(start + frames) / fps) for start in starts)
