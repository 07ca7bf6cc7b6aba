"""Runs the CUDA kernels of csrc/ on a CPU, for tests: the same sources as C++, with the emulated GPU of csrc/emulation.

    with cudasim.serving():
        frame_mass(query, key, frame_ids, num_frames=4, backend="cuda")  # CPU tensors

Nothing is compiled before it is asked for; ``python -m cudasim`` builds the library and prints where it is. Beside it:

- ``cudasim.emulator()``: schedules of threads by seed, counted events (bank conflicts among them), recorded launches;
- ``cudasim.replay``: calls of launchers recorded, and played back on another build, under a sanitizer for one;
- ``cudasim.conflicts``: bank conflicts of the attention kernels.
"""

from cudasim.library import SOURCES, build, compiler, serving
from cudasim.runtime import Emulator, Launch, emulator

__all__ = ["SOURCES", "Emulator", "Launch", "build", "compiler", "emulator", "serving"]
