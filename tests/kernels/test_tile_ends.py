"""Visibility that ends beside the end of a tile of keys, the same for all rows: whole tiles may then go unmasked."""

from typing import Any

import pytest
import torch
from attention_cases import Case, case
from attention_layouts import FRAMES
from backends import served

from appo_kernels import frame_attention, frame_mass
from appo_kernels.ops.frame_attention import reference
from appo_kernels.testing import compare

KEYS, ROWS = 160, 9
GRADIENTS = ("grad_query", "grad_key", "grad_value")


def bounds(kind: str, at: int) -> dict[str, torch.Tensor]:
    """Rows that see keys below ``at``, up to ``at``, from ``at`` on, or both sides of a gap that begins at it."""
    rows = torch.zeros(2, ROWS, dtype=torch.int64)
    return {
        "prefix": {"prefix_keys": rows + at, "last_key": rows - 1},
        "last": {"last_key": rows + at},
        "first": {"first_key": rows + at},
        "gap": {"prefix_keys": rows + at, "first_key": rows + at + 1},
    }[kind]


def results(example: Case, function: Any, **options: Any) -> dict[str, torch.Tensor]:
    output = function(*example[:4], num_frames=FRAMES, **example.bounds, **options)
    total = output.out.double().sum() + (output.mass.double() * torch.arange(1.0, FRAMES + 1, device="cpu")).sum()
    gradients = torch.autograd.grad(total + output.lse.double().sum(), example[:3])
    return {k: v.detach() for k, v in output._asdict().items()} | dict(zip(GRADIENTS, gradients, strict=True))


# One key before a tile of 32, 64 or 128 keys ends, at its end, and one behind it.
@pytest.mark.parametrize("at", [31, 32, 33, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("kind", ["prefix", "last", "first", "gap"])
@pytest.mark.parametrize(("backend", "device"), served("frame_attention", head_dim=32))
def test_ends_of_tiles(backend: str, device: str, kind: str, at: int) -> None:
    example = case(keys=KEYS, rows=ROWS, heads=(2, 1), head_dim=64, layout="equal", device=device)
    limits = {name: bound.to(device) for name, bound in bounds(kind, at).items()}
    half, single, double = (
        example._replace(bounds=limits).to(dtype) for dtype in (torch.float16, torch.float16, torch.float64)
    )
    got = results(half, frame_attention, backend=backend)
    exact = results(double._replace(query=single.query.detach().double().requires_grad_()), reference.frame_attention)
    plain = results(single, reference.frame_attention)
    compare(got, exact, plain, atol=2e-3)
    for lse in (got["lse"], None):
        mass = frame_mass(half.query, half.key, half.frame_ids, num_frames=FRAMES, lse=lse, backend=backend, **limits)
        compare({"mass": mass}, exact, plain, atol=2e-3)
    unseen = ~half._replace(bounds=limits).seen()[:, 0].any(1)  # (B, S): no row sees these keys
    for gradient in (got["grad_key"], got["grad_value"]):
        assert not gradient[unseen[:, None].expand(gradient.shape[:3])].any()
