"""The process in which math-verify reads and compares expressions: `appo.data.math_answers` starts it.

math-verify stops what takes too long by a signal, which only a main thread receives, and sympy can take memory without
end on a hostile expression: both are harmless in a process of its own. A request is (text,), answered by whether an
expression was found in it, or (truth, answer), answered by whether they are equal; None: the answer cannot be read.
"""

import logging
import re
from typing import Any

from appo.data.worker import serve

WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # not a LaTeX command


def parse(text: str) -> list[Any]:
    """math-verify's readings: a bare expression such as x^2 + 1 is read as LaTeX, prose as it is."""
    import math_verify

    if "$" in text or "\\boxed" in text:
        return math_verify.parse(text)
    as_prose = math_verify.parse(text) if WORD.search(text) else []
    return as_prose or math_verify.parse(f"${text}$")


def respond(*texts: str) -> bool | None:
    import math_verify

    readings = [parse(text) for text in texts]
    readable = not all(isinstance(reading, str) for reading in readings[-1])
    if len(texts) == 1:
        return readable
    return True if math_verify.verify(*readings) else False if readable else None


def main() -> None:
    logging.disable(logging.CRITICAL)
    limit_memory()
    serve(respond)


def limit_memory(limit: int = 4 << 30) -> None:
    """At most 4 GiB of address space, where the platform can say so: 9**9**9 is not worth the machine."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
