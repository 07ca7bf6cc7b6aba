"""Constants of csrc/ that Python repeats: a library with others is refused when it is loaded, by names and values."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from appo_kernels import cuda_constants, cuda_library, doctor, group_divergence_from_logits
from cudasim import SOURCES, build


def built(folder: Path, file: str, old: str, new: str) -> Path:
    """csrc/library.cu alone, from a copy of the sources in which ``old`` is ``new``."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert text.count(old) == 1
    (sources / file).write_text(text.replace(old, new))
    return build(sources, kernels=("library.cu",))


def test_the_library_exports_what_python_repeats() -> None:
    library = cuda_library.emulation(str(build()))
    assert cuda_constants.exported(library) == cuda_constants.expected()
    assert cuda_constants.expected()["HEAD_DIMS"] == (64, 80, 96, 128, 256)


# One of each kind: a number, a list that lost an entry, one that is typed in Python elsewhere, an enumeration.
@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("frame_ids.h", "kFrameTile = 32", "kFrameTile = 16", "FRAME_TILE is 16 there and 32 here"),
        ("head_dims.h", " X(96, __VA_ARGS__)", "", "HEAD_DIMS is 64 80 128 256 there and 64 80 96 128 256 here"),
        ("group_divergence.cuh", "kClamp = 11.f", "kClamp = 10.f", "DIVERGENCE_CLAMP is 10 there and 11 here"),
        ("launch.h", "kFloat16 = 1, kBfloat16 = 2", "kBfloat16 = 1, kFloat16 = 2", "ELEMENTS is 0 2 1 there"),
        ("library.cu", '    {"ROW_PADDING", kRowPadding},\n', "", "ROW_PADDING is missing there and 64 here"),
        ("library.cu", "APPO_EXPORT int appo_constants", "static int old_constants", "FRAME_TILE is missing there"),
    ],
)
def test_a_stale_build_is_refused(
    file: str, old: str, new: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = built(tmp_path, file, old, new)
    monkeypatch.setenv("APPO_EMULATION_LIBRARY", str(library))
    logits, lse, slots = torch.randn(2, 3, 40), torch.zeros(2, 3), torch.zeros(1, 2, 1, dtype=torch.int64)
    message = f"{re.escape(str(library))}: expected .* other sources: .*{re.escape(told)}.*Install again"
    with pytest.raises(cuda_constants.StaleLibraryError, match=message):
        group_divergence_from_logits(logits, lse, slots, backend="cuda")


def test_python_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cuda_library.emulation(str(build()))
    monkeypatch.setattr(cuda_constants, "K3_CLAMP", 12.0)
    with pytest.raises(cuda_constants.StaleLibraryError, match="DIVERGENCE_CLAMP is 11 there and 12 here"):
        cuda_constants.check(library, "here.so")


def test_the_doctor_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def stale() -> None:
        raise cuda_constants.StaleLibraryError("old.so: expected others")

    monkeypatch.setattr(cuda_library, "native", stale)
    (line,) = doctor.library_lines()
    assert "cannot be used" in line and "old.so: expected others" in line
    (line,) = doctor.backend_lines("frame_mass", "cuda", torch.device("cuda"))
    assert "built from other sources" in line
