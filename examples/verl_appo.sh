#!/usr/bin/env bash
# verl's trainer with APPO's token weights; pip install 'appo[verl]' and an engine of verl's beside it.
#   bash examples/verl_appo.sh MODEL TRAIN.parquet TEST.parquet [name=value ...]
# Prompts are in verl's own format, with decoded videos ("videos"). On one machine with 8 GPUs; not run as a whole here
# (docs/integrations.md says what was).
set -euo pipefail
model=$1 train=$2 test=$3
shift 3
python3 -m verl.trainer.main_ppo \
  trainer.v1.trainer_mode=appo \
  +appo.strategy=soft +appo.layers=3 +appo.alpha=1.7 \
  algorithm.adv_estimator=grpo \
  data.train_files="$train" data.val_files="$test" data.train_batch_size=64 \
  actor_rollout_ref.model.path="$model" \
  actor_rollout_ref.model.use_remove_padding=True \
  actor_rollout_ref.model.use_fused_kernels=True \
  actor_rollout_ref.model.fused_kernel_options.impl_backend=torch \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.clip_ratio_high=0.28 \
  actor_rollout_ref.actor.loss_agg_mode=token-mean \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  trainer.n_gpus_per_node=8 trainer.nnodes=1 "$@"
