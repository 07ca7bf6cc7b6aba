"""The page of several inspected clips: the picture of each, what was asked, and a link to its own page."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from appo.data.records import Record
from appo.reports.markup import png_uri, section, write_page


@dataclass(frozen=True)
class Drawn:
    """An inspected record: its folder, the accuracy of each response, and the frames that were picked."""

    record: Record
    folder: Path
    accuracy: list[float]
    frames: list[int]


def write_index(path: Path, model: str, drawn: Sequence[Drawn]) -> Path:
    """Write one self-contained page with the pictures of ``drawn`` to ``path``; their folders lie beside it."""
    parts = []
    for each in drawn:
        right = sum(value >= 0.5 for value in each.accuracy)
        picked = f"frames {', '.join(map(str, each.frames))} picked" if each.frames else "no frame picked"
        lead = (
            f"{right} of {len(each.accuracy)} responses right, {picked}. "
            f'<a href="{escape(each.folder.name)}/inspection.html">All responses, token by token</a>'
        )
        picture = png_uri(each.folder / "inspection.png")
        alt = escape(f"Attention of two responses over the frames of {each.record.id}")
        parts.append(section(each.record.question, lead, f'<div class="card"><img alt="{alt}" src="{picture}"></div>'))
    head = f"<header><h1>What {escape(Path(model).name)} looks at</h1><p>{len(drawn)} clips.</p></header>"
    return write_page(path, title="What the model looks at", body=f"<main>{head}{''.join(parts)}</main>")
