"""frame_attention, backend "cuda": csrc/attention_forward, csrc/attention_backward."""

from appo_kernels.attention import cuda_passes as passes
from appo_kernels.attention.cuda_passes import unsupported as unsupported

forward, backward = passes.attend, passes.attend_backward
