"""Runs compiled PTX on a CPU, with numpy, so that GPU kernels can be tested where there is no GPU.

    program = ptxsim.parse(ptx_text)
    ptxsim.launch(program, grid=(4, 1, 1), block=(128, 1, 1), arguments=[array, 7, 0.5], shared_bytes=1024, seed=0)

Every register is an array with one element per thread of the whole grid. What makes it a test rather than an emulator:

- global accesses outside the arguments, shared accesses outside the block's memory and misaligned ones are errors;
- registers and shared memory start as NaN bit patterns (0xff bytes);
- ``seed`` draws warp schedules in which single warps run far ahead of, or behind, the rest of their block;
- asynchronous copies poison their destination when issued and land only when the issuing thread waits for them;
- products of a warpgroup (wgmma) do the same with their accumulators, and what must order them (fences of registers and
  of the async proxy, commit, wait) is checked;
- tensor memory (tcgen05) must be allocated, waited for and freed, and its products fenced, committed and waited for;
- an unknown opcode, type or modifier is an error, never a guess.

``ptxsim.triton_device`` makes the simulator the device that Triton launches its kernels on.
Executed: what Triton emits for this project's kernels on sm_80, sm_90 and sm_100, and what nvcc emits for sm_80;
``python -m ptxsim`` lists opcodes and modifiers. Not executed: TMA, clusters, arrivals of threads at an mbarrier.
"""

from ptxsim.machine import Statistics, launch
from ptxsim.memory import Pointer
from ptxsim.parser import Program, parse

__all__ = ["Pointer", "Program", "Statistics", "launch", "parse"]
