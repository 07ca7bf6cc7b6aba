"""A pretended GPU: tensors that say ``cuda`` and hold host memory, so that code for a GPU runs without one.

    with gpu_rehearsal.rehearse() as recording:
        x = torch.randn(8, device="cuda")     # any torch code on device "cuda": real values, real control flow
        (x > 0).nonzero()
    print(recording.report())                 # sync  1 x nonzero  file.py:3 < ...

A recording has what a GPU would make expensive or refuse, each with the lines that asked for it: synchronisations,
uploads, operations on tensors of two devices, launch grids that no GPU takes; and it counts torch operations, matrix
products and launches of Triton and CUDA kernels. Kernels are not run: an operator's
backend "torch" computes what they would.
``python -m gpu_rehearsal`` prints the counts of every operator and backend beside their budgets (``budgets.txt``).
"""

from gpu_rehearsal.device import rehearse
from gpu_rehearsal.recording import Event, Launch, Recording

__all__ = ["Event", "Launch", "Recording", "rehearse"]
