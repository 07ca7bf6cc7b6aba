"""Records of other trainers: EasyR1, verl, ms-swift, TRL, and LLaVA's conversations.

Field names: EasyR1's `verl/utils/dataset.py`, verl's data preparation guide, ms-swift's custom dataset guide, TRL's
dataset formats and LLaVA's custom data guide.
"""

from typing import Any

from appo.data.fields import Fields
from appo.data.formats_plain import ANSWER_FIELDS, media_of, question_and_answer
from appo.data.overlooked import MEDIA_FIELDS
from appo.data.records import Media, Record


def easy_r1(fields: Fields, seed: int) -> Record:
    """problem, answer, images or videos; <image> and <video> in the problem mark their places."""
    name = _answer_field(fields)
    return question_and_answer(fields, "problem", fields.text("problem"), name, fields.scalar(name), source="EasyR1")


def trl(fields: Fields, seed: int) -> Record:
    """prompt (a text or messages), image or images, and a column with the answer."""
    question, media = _conversation(fields, "prompt")
    name = _answer_field(fields)
    return question_and_answer(
        fields, "prompt", question, name, fields.scalar(name), media=media or media_of(fields), source="TRL"
    )


def verl(fields: Fields, seed: int) -> Record:
    """prompt (messages), images or videos, reward_model.ground_truth, data_source, extra_info."""
    question, media = _conversation(fields, "prompt")
    model, extra = fields.listed("reward_model"), fields.listed("extra_info")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    if not isinstance(truth, (str, int, float)) or isinstance(truth, bool):
        fields.fail("reward_model", 'an object with "ground_truth", a text or number', model)
    id = str(extra["index"]) if isinstance(extra, dict) and isinstance(extra.get("index"), (int, str)) else None
    return question_and_answer(
        fields,
        "prompt",
        question,
        "reward_model",
        str(truth).strip(),
        media=media or media_of(fields),
        source="verl",
        id=id,
    )


def ms_swift(fields: Fields, seed: int) -> Record:
    """messages, images, videos; the answer is a column ``solution`` or the last message."""
    question, media = _conversation(fields, "messages")
    name = next((name for name in ("solution", "answer", "ground_truth") if name in fields.raw), None)
    answer = fields.scalar(name) if name else _said(fields, "messages", ("assistant",))
    return question_and_answer(
        fields, "messages", question, name or "messages", answer, media=media or media_of(fields), source="ms-swift"
    )


def llava(fields: Fields, seed: int) -> Record:
    """conversations of one question (from: human) and one answer (from: gpt), video or image."""
    name = next((name for name in ("solution", "ground_truth") if name in fields.raw), None)
    question = _said(fields, "conversations", ("human", "user"))
    answer = fields.scalar(name) if name else _said(fields, "conversations", ("gpt", "assistant"))
    if not any(fields.raw.get(other) for other in ("image", "images")):
        question = question.replace("<image>", "<video>")  # LLaVA-Video marks its videos so
    return question_and_answer(fields, "conversations", question, name or "conversations", answer, source="LLaVA")


def _answer_field(fields: Fields) -> str:
    return next((name for name in ANSWER_FIELDS if name in fields.raw), ANSWER_FIELDS[0])


def _turns(fields: Fields, name: str) -> list[tuple[str, Any]]:
    """(role, content) of each message."""
    messages = fields.listed(name)
    if isinstance(messages, str) and name == "prompt":
        return [("user", messages)]
    if not isinstance(messages, list) or not messages:
        fields.fail(name, "a list of messages", messages)
    turns = []
    for message in messages:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, (str, list)):
            fields.fail(name, "messages with role and content (or from and value)", messages)
        turns.append((role, content))
    if turns[0][0] in ("assistant", "gpt"):
        fields.fail(name, "the user's message before the assistant's", messages)
    return turns


def _said(fields: Fields, name: str, roles: tuple[str, ...]) -> str:
    """The text of the only message of a role."""
    found = [content for role, content in _turns(fields, name) if role in roles]
    if not found and "assistant" in roles:
        fields.fail(name, f"an answer: one message of {' or '.join(roles)}, or a field `solution`", fields.raw[name])
    if len(found) != 1:
        fields.fail(name, f"one message of {' or '.join(roles)} (split records of several rounds)", fields.raw[name])
    text = "".join(part["text"] for part in _parts(fields, name, found[0]) if part["type"] == "text").strip()
    if not text:
        fields.fail(name, f"text in the message of {' or '.join(roles)}", fields.raw[name])
    return text


def _conversation(fields: Fields, name: str) -> tuple[str, tuple[Media, ...]]:
    """The question of messages with one user turn, and the media that its parts name themselves.

    Parts without a path ({"type": "image"}) are marks for the record's own columns. System messages are left out: the
    prompt has its own.
    """
    found = [content for role, content in _turns(fields, name) if role in ("user", "human")]
    if len(found) != 1:
        fields.fail(name, "one message of the user (split records of several rounds)", fields.raw[name])
    text, media = "", []
    for part in _parts(fields, name, found[0]):
        kind = part["type"]
        if kind == "text":
            text += part["text"]
            continue
        text += f"<{kind}>"
        if any(part.get(key) for key in ("path", "bytes", kind, f"{kind}_url")):
            value = part.get(kind, part)
            times = {
                key: part[key]
                for key in ("start", "end", "video_start", "video_end", "fps")
                if part.get(key) is not None
            }
            own = fields.of(times)
            media.append(own.medium(kind, name, value))
    if media and any(other in fields.raw for other in MEDIA_FIELDS):
        fields.fail(name, "media in the messages or in columns of their own, not in both", fields.raw[name])
    return text, tuple(media)


def _parts(fields: Fields, name: str, content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        kind = {"image_url": "image", "video_url": "video"}.get(str(kind), kind)
        if kind not in ("text", "image", "video") or (kind == "text" and not isinstance(part.get("text"), str)):
            fields.fail(name, 'parts of type "text", "image" or "video"', part)
        parts.append({**part, "type": kind})
    return parts
