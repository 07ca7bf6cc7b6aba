"""The bundled tasks by name: their clips, their warm start, and the settings that go with them."""

from dataclasses import dataclass, field, replace
from typing import Any

from appo.tasks.questions import Difficulty
from appo.tasks.thoughts import Irrelevant


@dataclass(frozen=True)
class Task:
    """clips: of `appo.tasks.make_task`. warm: of `appo.demo.warm_start`. settings: what differs from the demo's."""

    clips: dict[str, Any] = field(default_factory=dict)
    warm: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


# What a warm start has not seen the like of, it answers without the sentence that tells, whole groups of it.
NOISY = Difficulty(noise=14.0, size=(0.17, 0.26), distractors=1)
FAINT = replace(NOISY, contrast=0.6)

SENTENCE_TOKENS = 24  # a response without irrelevant words has at most so many
SPARE_TOKENS = 16  # for responses with more irrelevant words than they were taught


def verbose(words: int, vocabulary: int) -> Task:
    """Clips in which a colour flashes, answered at length: so many irrelevant words around what was seen.

    The warm start sees the training clips' noise, sizes and distractor at full contrast, and takes longer than the
    demo's. Sampling leaves out the tail of each distribution: with some 60 tokens a response, words of one in a
    thousand break the sentence of one in twenty.
    """
    return Task(
        clips={
            "kinds": ("colour",),
            "difficulties": {"warmup": NOISY, "train": FAINT, "validation": FAINT},
        },
        warm={"steps": 550, "plain_steps": 250, "irrelevant": Irrelevant(words, vocabulary)},
        settings={"max_new_tokens": SENTENCE_TOKENS + words + (SPARE_TOKENS if words else 0), "top_p": 0.98},
    )


TASKS: dict[str, Task] = {
    "moment": Task(),
    "cue": Task(
        clips={"kinds": ("cue",)},
        warm={"model_options": {"num_hidden_layers": 2}, "looking_steps": 40, "steps": 200, "label_noise": 0.4},
        # The look-up is one token's and may happen in the first layer: every layer counts, and the one largest mass.
        settings={"layers": 2, "top_tokens": 1, "top_frames": 1},
    ),
    "verbose-0": verbose(0, 1),
    # Number of irrelevant words x number of words that they are drawn from: their noise, and their entropy.
    **{f"verbose-{words}x{size}": verbose(words, size) for words in (24, 48, 96) for size in (2, 4, 40)},
}
