"""group_attention, backend "cuda": csrc/attention_forward and csrc/attention_backward, one pass a group."""

from functools import partial

from appo_kernels.attention import by_group
from appo_kernels.attention import cuda_passes as passes
from appo_kernels.attention.cuda_passes import unsupported as unsupported

forward, backward = partial(by_group.forward, passes.attend), partial(by_group.backward, passes.attend_backward)
