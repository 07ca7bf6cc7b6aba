"""Fields that a plain format would pass over in silence: a video in a column of another name, options, sound.

A record is about nothing but text where it names no media, so a video that is not read would make it a question without
one. Such records are refused with the field's name.
"""

import re
from typing import Any

from appo.data.fields import Fields
from appo.data.records import Media

# Names under which people keep media, and the kind of each.
MEDIA_FIELDS = {
    "videos": "video", "video": "video", "video_path": "video", "frames": "video",
    "images": "image", "image": "image", "image_path": "image",
}  # fmt: skip
OPTION_FIELDS = ("options", "choices", "candidates")

_OF_A_FILE = (
    r"paths?|files?|filenames?|file_names?|basename|names?|ids?|idx|index|urls?|uris?|dirs?|folders?|list|bytes"
)
_MEDIA = re.compile(rf"(?:video|image|img|clip|frame|picture|photo)s?(?:_?(?:{_OF_A_FILE}|\d+))?|vid|media", re.I)
_OPTIONS = re.compile(r"options?|choices?|candidates?|opts?|(?:option|choice|candidate)[ _]?[a-e0-5]", re.I)
_LETTER = re.compile(r"\(?[A-Z]\)?\.?")
_SOUND = re.compile(r"audios?(?:_?(?:paths?|files?))?", re.I)
# Fields that say something of a video.
_OF_A_VIDEO = ("time_spans", "duration", "start", "end", "video_start", "video_end", "start_time", "end_time", "fps")


def check_media(fields: Fields, media: tuple[Media, ...]) -> None:
    """Refuse a record whose media, or whose sound, no format reads. Raises DataError naming the field."""
    for name, value in fields.raw.items():
        if _SOUND.fullmatch(name) and _filled(value):
            fields.fail(name, "no sound: frames and text are all that a model is shown", value)
    if media:
        return
    read = ", ".join(MEDIA_FIELDS)
    for name, value in fields.raw.items():
        if name not in MEDIA_FIELDS and _MEDIA.fullmatch(name) and _filled(value):
            fields.fail(name, f"media in one of the fields {read}", value)
    for name in MEDIA_FIELDS:
        if name in fields.nulls:
            fields.fail(name, "a path; a record without media leaves the field out, or has []", None)
    for name in _OF_A_VIDEO:
        if name in fields.raw:
            fields.fail("video", f"a video, since the record has `{name}`", None)


def check_options(fields: Fields, answer: str) -> None:
    """Refuse a record whose options stand in a field that is not read. Raises DataError naming the field."""
    for name, value in fields.raw.items():
        if name not in OPTION_FIELDS and _OPTIONS.fullmatch(name) and _filled(value):
            fields.fail(name, f"options as a list in one of the fields {', '.join(OPTION_FIELDS)}", value)
    for name in OPTION_FIELDS:
        # MathVista's questions without choices have null.
        if name in fields.nulls and (name == "candidates" or _LETTER.fullmatch(answer)):
            fields.fail(name, f"a list of texts, of which {answer!r} is the answer", None)


def _filled(value: Any) -> bool:
    return not isinstance(value, bool) and value not in (None, "", [], {})
