"""A perception task of the project's own: clips in which one short moment decides the question.

Question kinds: the colour of a flash, the order of two, how many there were, which way a shape jumped, which
of two objects blinked, and which colour shows at the time that a mark points at: there a response that misreads
the mark looks elsewhere than a right one. What makes seeing hard (noise, size, contrast, length, distractors)
is a parameter, and the deciding moments are known, so that temporal grounding and frame selection can be
measured.
"""

from appo.tasks.dataset import DIFFICULTIES, SIZES, make_task, response_text, think_text
from appo.tasks.questions import KINDS, Difficulty
from appo.tasks.thoughts import IRRELEVANT_WORDS, Irrelevant, telling_spans

__all__ = [
    "DIFFICULTIES",
    "IRRELEVANT_WORDS",
    "KINDS",
    "SIZES",
    "Difficulty",
    "Irrelevant",
    "make_task",
    "response_text",
    "telling_spans",
    "think_text",
]
