"""Numbers and expressions in answers: what a text says, as people and models write it.

A number may have a Unicode minus sign, digits of any script, thousands separators, a decimal comma and a unit.
"""

import logging
import math
import re
import unicodedata

from appo.data.math_worker import WORD
from appo.data.worker import Worker, WorkerError

logger = logging.getLogger(__name__)

LONGEST = 2_000  # characters of an expression that math-verify is asked about
SECONDS = 20.0  # that it may take; math-verify itself gives up after 5

_worker = Worker("appo.data.math_worker")

_MINUS = dict.fromkeys(map(ord, "−﹣－‐‑‒–—"), "-")
_SEPARATORS = {ord("٫"): ".", ord("٬"): ","}
_SUPERSCRIPT = {ord(raised): plain for raised, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True)}
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_GROUPED = re.compile(r"(?<=\d)[ \u00a0\u2009\u202f](?=\d{3}(?!\d))")
_NUMBER = re.compile(r"(?<![A-Za-z^_\d.,])[-+]?(?:\d[\d.,]*|[.,]\d+)(?:[eE][-+]?\d+)?")
_POWER = re.compile(r"\d\s*(?:\^|\*\*)")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+")
_UNIT = r"(?:[A-Za-zµμΩ°]+(?:\^?[-+]?\d)?)"
_WITH_UNIT = re.compile(rf"([-+]?[\d.,]+(?:[eE][-+]?\d+)?)\s*({_UNIT}(?:(?:\s*[/·*]\s*|\s+){_UNIT})*)?\.?")
_LETTER_UNITS = frozenset("msghdlLNJWVAKCFHTΩ°")
_MULTIPLE = re.compile(r"(?:hundred|thousand|million|billion|trillion|dozen|k|bn)s?", re.IGNORECASE)
_JOINS = frozenset({"or", "and", "to"})
_COMMAND = re.compile(r"\\[A-Za-z]+|\\.|[$]")
_CONSTANT = re.compile(r"(?<![A-Za-z])(?:pi|e|sqrt|sin|cos|tan|log|ln|exp)(?![A-Za-z])|[πτ√]")


def plain_text(text: str) -> str:
    """``text`` with ASCII digits and minus signs, "m²" as "m^2" and "3½" as "3.5"."""
    text = _RAISED.sub(lambda found: "^" + found[0].translate(_SUPERSCRIPT), text.translate(_MINUS))
    text = _fractions(_GROUPED.sub("", text).translate(_SEPARATORS))
    text = unicodedata.normalize("NFKC", text)
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    return text


def number(text: str) -> float | None:
    """The one finite number in ``text``; None for none, several, or what is more than a number: 10^5, \\sqrt{2}."""
    text = plain_text(text)
    found = _NUMBER.findall(text)
    if len(found) != 1 or _POWER.search(text) or "\\" in text:
        return None
    if any(_MULTIPLE.fullmatch(word) for word in re.findall(r"[A-Za-z]+", text)):
        return None  # "5 million"
    return _value(found[0])


def quantity(text: str) -> float | None:
    """The number that ``text`` is, alone or with a unit behind it, such as "5 m²"; None for everything else."""
    match = _WITH_UNIT.fullmatch(plain_text(text).strip())
    if match is None:
        return None
    units = re.findall(r"[A-Za-zµμΩ°]+", match[2] or "")
    if any(_MULTIPLE.fullmatch(u) or u in _JOINS or (len(u) == 1 and u not in _LETTER_UNITS) for u in units):
        return None
    return _value(match[1])


def is_number(text: str) -> bool:
    """Whether ``text`` can be a numerical truth: a number, or an expression in numbers such as 1/2 or \\sqrt{2}.

    It looks at the characters only, so that whole files are checked as they load; ``reads`` asks math-verify.
    """
    text = plain_text(text)
    if (match := _WITH_UNIT.fullmatch(text.strip())) and not re.search(r"[\^\d]", match[2] or ""):
        return quantity(text) is not None
    if any(not math.isfinite(float(token)) for token in re.findall(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", text)):
        return False
    rest = _CONSTANT.sub("", _COMMAND.sub("", text))
    return any(c.isdigit() for c in text) and not any(c.isalpha() for c in rest)


def reads(text: str) -> bool:
    """Whether math-verify finds a number or an expression in ``text``."""
    if quantity(text) is not None:
        return True
    if not text.strip() or len(text) > LONGEST:
        return False
    return bool(_ask(plain_text(text)))


def equal(truth: str, answer: str) -> bool | None:
    """Whether two texts say the same number or expression; None where ``answer`` cannot be read as one.

    Numbers are equal when they agree to six places, as math-verify has it; it decides on everything else.
    """
    right, found = quantity(truth), quantity(answer)
    if right is not None and found is not None:
        return round(right, 6) == round(found, 6)
    if not answer.strip() or len(answer) > LONGEST:
        return None
    answer = plain_text(answer)
    if WORD.search(answer) and len(_NUMBER.findall(answer)) > 1 and "\\boxed" not in answer:
        return None  # "3 or 4" names no answer; math-verify would take the last number
    return _ask(plain_text(truth), answer)


def _ask(*texts: str) -> bool | None:
    try:
        answer: bool | None = _worker.ask(texts, SECONDS)
    except WorkerError as error:
        logger.warning("math-verify: %s, asked about %s", error, [text[:80] for text in texts])
        return None
    return answer


def _value(token: str) -> float | None:
    """A number with its separators: the last of "." and "," is the decimal one unless it groups thousands."""
    mantissa, e, exponent = token.lower().partition("e")
    sign, digits = (mantissa[0], mantissa[1:]) if mantissa[0] in "+-" else ("", mantissa)
    digits = digits.rstrip(".,")
    commas, points = digits.count(","), digits.count(".")
    if commas and points:
        decimal = max(",.", key=digits.rfind)
        grouping = "," if decimal == "." else "."
        whole, _, rest = digits.rpartition(decimal)
        if not _THOUSANDS.fullmatch(whole.replace(grouping, ",")) or decimal in whole:
            return None
        digits = whole.replace(grouping, "") + "." + rest
    elif commas == 1 and not _THOUSANDS.fullmatch(digits):
        digits = digits.replace(",", ".")
    elif commas or points > 1:
        grouped = digits.replace(".", ",")
        if not _THOUSANDS.fullmatch(grouped):
            return None
        digits = grouped.replace(",", "")
    if not any(c.isdigit() for c in digits):
        return None
    value = float(sign + digits + e + exponent)
    return value if math.isfinite(value) else None


def _fractions(text: str) -> str:
    """ "3½" and "½" as decimals."""
    if text.isascii():
        return text

    def decimal(found: re.Match[str]) -> str:
        return repr(int(found[1] or 0) + unicodedata.numeric(found[2]))

    return re.sub(r"(\d{1,15})?\s?([\u00bc-\u00be\u2150-\u215e])", decimal, text)
