"""Training: the step, the policy, packing, checkpoints, evaluation and logs."""
