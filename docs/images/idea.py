"""Draws idea.svg: python docs/images/idea.py

Three steps on a made-up group of four responses, computed with the library's own functions.
"""

import math
from pathlib import Path

import torch

from appo import perception_slots, select_frames, token_weights
from appo_kernels import group_divergence_from_logits

FILE = Path(__file__).with_suffix(".svg")
G, N, F, V = 4, 12, 6, 20
REWARDS = torch.tensor([1.0, 1.0, 0.0, 1.0])
BLUE, ORANGE, GREY, TEXT = "#1b6ca8", "#e07b00", "#c8d0d8", "#222222"
FRAMES = ("#9fc5e8", "#b6d7a8", "#ffe599", "#f4b183", "#d5a6bd", "#b4a7d6")


def group() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mass (G, N, F), key frames, slots and weights of the drawn group; right responses look at frame 3."""
    mass = torch.tensor(
        [[[0.03 + 0.02 * math.sin(1 + 2 * i + 3 * t + 5 * f) for f in range(F)] for t in range(N)] for i in range(G)]
    )
    for i, looked in enumerate((3, 3, 1, 3)):
        mass[i, 4 + i % 2 : 7 + i % 2, looked] += torch.tensor([0.15, 0.3, 0.2])
    mask = torch.ones(G, N, dtype=torch.bool)
    frames = select_frames(mass, mask, REWARDS, top_tokens=3, top_frames=1)
    slots = perception_slots(mass, mask, frames, top_tokens=3)
    logits = torch.tensor(
        [[[3 * math.sin(i * (t % 5) + 0.7 * v) for v in range(V)] for t in range(N)] for i in range(G)]
    )
    divergence = group_divergence_from_logits(logits, logits.logsumexp(-1), slots)
    return mass, frames, slots, token_weights(divergence, slots, mask)


def rect(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" fill="{fill}" {more}/>'


def text(x: float, y: float, words: str, more: str = 'font-size="13"') -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{TEXT}" {more}>{words}</text>'


def heading(x: float, number: int, words: str, below: str) -> list[str]:
    return [text(x, 28, f"{number}. {words}", 'font-size="16" font-weight="bold"'), text(x, 48, below)]


def one_row(mass_F: torch.Tensor) -> list[str]:
    """Keys of the frames and of text as a flash pass meets them, and the mass that a row gives each frame."""
    parts = heading(20, 1, "One more sum in a flash pass", "query row r against tiles of keys; no matrix is kept")
    for tile in range(F + 2):
        fill, name = (FRAMES[tile], f"f{tile}") if tile < F else ("#eeeeee", "text")
        parts += [rect(20 + 40 * tile, 70, 36, 40, fill, 'rx="4"'), text(28 + 40 * tile, 94, name)]
        if tile < F:
            height = 240 * float(mass_F[tile])
            parts.append(rect(24 + 40 * tile, 225 - height, 28, height, FRAMES[tile], f'stroke="{GREY}"'))
    lines = ("mass of frame f = sum over its keys of exp(q·k - lse):", "the row sum that the softmax needs anyway,")
    parts += [text(20, 248 + 18 * i, line) for i, line in enumerate((*lines, "handed on when the frame changes"))]
    return parts


def key_frames(mass: torch.Tensor, frames: torch.Tensor) -> list[str]:
    """A[i, f] as cells, rewards beside them, the chosen column outlined."""
    parts = heading(385, 2, "Key frames of a group", "looked at by right responses, not by wrong ones")
    attention = mass.topk(3, dim=1).values.mean(1)
    for i in range(G):
        parts.append(text(385, 93 + 38 * i, "right" if REWARDS[i] else "wrong"))
        for f in range(F):
            strength = min(1.0, float(attention[i, f]) / 0.25)
            parts.append(rect(430 + 34 * f, 70 + 38 * i, 32, 36, BLUE, f'fill-opacity="{0.08 + 0.9 * strength:.2f}"'))
    for f in frames.tolist():
        parts.append(rect(429 + 34 * f, 67, 34, 38 * G + 4, "none", f'stroke="{ORANGE}" stroke-width="3" rx="4"'))
    parts += [text(438 + 34 * f, 242, f"f{f}") for f in range(F)]
    return [*parts, text(385, 266, "A[i,f]: mean of the largest masses of response i")]


def weights(slots: torch.Tensor, weight_GN: torch.Tensor) -> list[str]:
    """W[i, t] as bars; members of slots in orange."""
    parts = heading(705, 3, "Perception tokens get a weight", "on the key frame; larger where they disagree")
    for i in range(G):
        members = set(slots[:, i].flatten().tolist())
        for t in range(N):
            height = 11 * float(weight_GN[i, t])
            fill = ORANGE if t in members else GREY
            parts.append(rect(705 + 25 * t, 106 + 38 * i - height, 21, height, fill))
    lines = ("W in the loss -W min(rho A, clip(rho) A);", "W = 1 everywhere is GRPO or DAPO")
    return [*parts, *(text(705, 248 + 18 * i, line) for i, line in enumerate(lines))]


def draw() -> str:
    mass, frames, slots, weight = group()
    parts = [rect(0, 0, 1030, 300, "#ffffff"), *one_row(mass[0, 5]), *key_frames(mass, frames), *weights(slots, weight)]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1030 300" font-family="Helvetica, Arial, sans-serif">'
    return "\n".join([head, *parts, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(draw())
