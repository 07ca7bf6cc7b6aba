"""The shell of a page that needs nothing but itself, and the pieces both pages draw: tokens, badges, keys, tiles."""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

# The page may use its own pictures and styles, run its own script and no other, and ask nobody for anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# Browsers ask the server for an icon unless the page names one.
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E"
    "%3Crect width='8' height='8' rx='2' fill='%232f62d8'/%3E%3C/svg%3E"
)


def write_page(path: Path, *, title: str, body: str, script: str = "") -> Path:
    """Write a complete page with the shared style and, where given, a script of this package."""
    source = f"\n{asset(script)}" if script else ""
    code = f"<script>{source}</script>\n" if script else ""
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" if script else "'none'"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}; script-src {allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="{_ICON}">\n<style>\n{asset("style.css")}</style>\n'
        f"</head>\n<body>\n{body}\n{code}</body>\n</html>\n",
        encoding="utf-8",
        errors="replace",  # halves of surrogate pairs, which JSON can hold and no file can
    )
    return path


def asset(name: str) -> str:
    return files("appo.reports").joinpath(name).read_text(encoding="utf-8")


def section(title: str, lead: str, content: str) -> str:
    """A titled part of the page; nothing where there is no content."""
    if not content:
        return ""
    return f'<section><h2>{escape(title)}</h2><p class="lead">{lead}</p>{content}</section>'


def tile(name: str, value: str, note: str, *, strong: bool = False) -> str:
    kind = "tile strong" if strong else "tile"
    return f'<div class="{kind}"><h3>{escape(name)}</h3><b>{value}</b><p>{escape(note)}</p></div>'


def answer_class(option: str, answer: str) -> str:
    """The attribute that marks the option with the letter or the text ``answer``; empty for the others."""
    return (
        ' class="answer"' if answer and (option == answer or option.startswith((f"{answer}.", f"({answer})"))) else ""
    )


def key(entries: Sequence[tuple[str, str, bool]]) -> str:
    """The meaning of the colours of lines: (label, colour, dashed)."""
    items = (
        f'<span><i style="border-top:3px {"dashed" if dashed else "solid"} {colour}"></i>{escape(label)}</span>'
        for label, colour, dashed in entries
    )
    return f'<p class="key">{"".join(items)}</p>'


def verdict(accuracy: float) -> str:
    """Right and wrong, by word as well as by colour."""
    word = "right" if accuracy >= 0.5 else "wrong"
    return f'<span class="verdict {word}">{word}</span>'


def shown(token: str) -> str:
    """A token as text that can be seen: line breaks and a token without ink get a sign."""
    text = whole(token).replace("\n", "⏎").replace("\t", "⇥")
    return text if text.strip() else text.replace(" ", "␣") or "∅"


def whole(text: str) -> str:
    """``text`` with a question mark for each half of a surrogate pair, which no font draws and no file holds."""
    return text.encode("utf-8", "replace").decode()


def token_spans(tokens: Sequence[str], weights: Sequence[float] | None, top: float) -> str:
    """Tokens in a row, each tinted by its weight: 1 is plain, ``top`` the full tint."""
    gap = "" if any(token[:1].isspace() for token in tokens) else " "
    spans = []
    for index, token in enumerate(tokens):
        weight = None if weights is None else weights[index]
        note = "" if weight is None else f' title="weight {weight:.2f}" style="{tint(weight, top)}"'
        spans.append(f'<span class="token"{note}>{escape(shown(token))}</span>')
    return f'<p class="tokens">{gap.join(spans)}</p>'


def tint(weight: float, top: float) -> str:
    share = 0.0 if top <= 1 or math.isnan(weight) else min(1.0, max(0.0, (weight - 1) / (top - 1)))
    return f"background:rgba(245,158,11,{0.85 * share:.3f})"


def weight_scale(top: float) -> str:
    """The legend of token tints."""
    if top <= 1:
        return '<p class="scale">Every token counts once (weight 1).</p>'
    return f'<p class="scale"><span>weight 1</span><i></i><span>{top:.2f}</span></p>'


def png_uri(path: Path) -> str:
    """A PNG as a data URI; empty where the file is no such picture."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for files of any kind
        return ""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def jpeg_uri(image: np.ndarray, side: int = 160) -> str:
    """A thumbnail (H, W, 3) uint8 as a data URI, its longer side ``side`` pixels; small ones are enlarged sharply."""
    picture = Image.fromarray(image)
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    picture.resize(size, how).save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
