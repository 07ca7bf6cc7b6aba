"""group_attention, backend "triton": one attention pass a group."""

from functools import partial

from appo_kernels.attention import by_group
from appo_kernels.attention import triton_passes as passes
from appo_kernels.triton_launch import unsupported as unsupported

forward, backward = partial(by_group.forward, passes.attend), partial(by_group.backward, passes.attend_backward)
