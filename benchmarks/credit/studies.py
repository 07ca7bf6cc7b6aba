"""The registered studies of credit (benchmarks/credit/PREREGISTRATION.md) as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from appo.credit.weightings import BASE, WEIGHTINGS
from appo.tasks.named import TASKS

SEEDS = (300, 301, 302)  # of warm starts, with their clips
# Rows that the second registration added.
LATER_ROWS = ("peak", "common-one", "peak-together")
FIRST_ROWS = tuple(name for name in WEIGHTINGS if name not in LATER_ROWS)


@dataclass(frozen=True)
class Study:
    """A measurement whose results are results/credit-NAME.*.

    about: what it is, in a few words. groups: of each warm start, with rewards that differ. first: the batch of 16
    prompts that it begins with. rows: of `appo.credit.weightings.WEIGHTINGS`. hypotheses: number -> (row, row that it
    is compared with), all tested together.
    """

    about: str
    task: str
    groups: int
    seeds: tuple[int, ...] = SEEDS
    first: int = 0
    rows: tuple[str, ...] = FIRST_ROWS
    hypotheses: Mapping[str, tuple[str, str]] = field(default_factory=dict)


MAIN, FRAMES = "verbose-48x4", "frames"
STUDIES = {
    MAIN: Study(
        "48 irrelevant words of 4 around what was seen (first registration)",
        MAIN,
        groups=1000,
        hypotheses={
            "0": ("oracle", BASE),
            "1": ("hard", BASE), "2": ("soft", BASE), "3": ("contrast", BASE), "4": ("all", BASE),
            "5": ("released", BASE),
            "6": ("true-frames", "shuffled"),
            "7": ("together", BASE), "8": ("together", "80/20"), "9": ("together", "middle-entropy"),
            "10": ("together", "all"),
            "11": ("80/20", BASE), "12": ("tw-grpo", BASE),
            "13": ("together", "entropy-alone"), "14": ("together-true-frames", "together"),
        },
    ),
    # Of prompts that the main study does not reach.
    FRAMES: Study(
        "a choice of frames that finds the one that decides (second registration; verbose-48x4)",
        MAIN,
        groups=300,
        first=70,
        rows=(BASE, "only-told", "oracle", "all", "together", "together-true-frames", "entropy-alone", "middle-entropy",
              *LATER_ROWS),
        hypotheses={
            "F0": ("oracle", BASE), "F1": ("peak", BASE), "F2": ("peak", "all"), "F3": ("peak-together", BASE),
            "F4": ("peak-together", "common-one"), "F5": ("peak-together", "entropy-alone"),
            "F6": ("peak-together", "middle-entropy"), "F7": ("peak-together", "together"),
        },
    ),
    # Secondary: the sanity hypothesis alone, on one warm start.
    **{
        name: Study(
            "other irrelevant words (secondary)", name, groups=150, seeds=SEEDS[:1], hypotheses={"0": ("oracle", BASE)}
        )
        for name in TASKS
        if name.startswith("verbose") and name != MAIN
    },
}  # fmt: skip
