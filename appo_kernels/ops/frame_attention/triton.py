"""frame_attention, backend "triton": one online-softmax pass, its finish, and the gradients."""

from appo_kernels.attention import triton_passes as passes
from appo_kernels.triton_launch import unsupported as unsupported

forward, backward = passes.attend, passes.attend_backward
