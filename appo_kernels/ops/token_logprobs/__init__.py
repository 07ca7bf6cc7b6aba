"""Log-probability, entropy and log-sum-exp of tokens, without a tensor of logits."""

from appo_kernels.ops.token_logprobs.op import TokenLogprobs, token_logprobs

__all__ = ["TokenLogprobs", "token_logprobs"]
