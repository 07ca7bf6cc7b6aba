"""The chat messages that ask a record's question."""

import re
from typing import Any

from appo.data.records import Record

SYSTEM_PROMPT = (
    "You watch the video and answer the question about it. First reason about what you see inside <think> </think> "
    "tags, then give the final answer inside <answer> </answer> tags."
)
TIME_PROMPT = (
    " After the answer, name the moments of the video that decide it, in seconds, inside <time> </time> tags, such as "
    "<time>8.4 to 12.5, 25 to 30.2</time>."
)
ANSWER_PROMPTS = {
    "multiple choice": "Answer with the letter of one option.",
    "numerical": "Answer with one number.",
    "regression": "Answer with one number.",
    "math": "Answer with one mathematical expression.",
    "ocr": "Answer with the text as it is written.",
    "free-form": "Answer in a short sentence.",
}


def prompt_messages(record: Record, *, instructions: bool = True, text: str | None = None) -> list[dict[str, Any]]:
    """The chat messages that ask a record's question: the format to answer in, the media, the question, its options.

    ``instructions=False`` leaves out the system message and the line on how to answer, for a model that was trained on
    the format. text: what stands beside the media instead of all that, such as a benchmark's own prompt.
    """
    if text is not None:
        return [{"role": "user", "content": _placed(record, text)}]
    text = "\n".join((record.question, *record.options, *([ANSWER_PROMPTS[record.kind]] if instructions else [])))
    user = {"role": "user", "content": _placed(record, text)}
    if not instructions:
        return [user]
    system = SYSTEM_PROMPT + (TIME_PROMPT if record.asks_time else "")
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, user]


def _placed(record: Record, text: str) -> list[dict[str, Any]]:
    """The media and the text; media stand where the question has <image> and <video> for all of them, else in front."""
    parts = [{"type": media.kind, media.kind: str(media.path)} for media in record.media]
    pieces = re.split(r"<(image|video)>", text)
    if not parts or sorted(pieces[1::2]) != sorted(media.kind for media in record.media):
        return [*parts, {"type": "text", "text": text}]
    of_kind = {kind: iter([part for part in parts if part["type"] == kind]) for kind in ("image", "video")}
    content: list[dict[str, Any]] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            content.append(next(of_kind[piece]))
        elif piece.strip():
            content.append({"type": "text", "text": piece})
    return content
