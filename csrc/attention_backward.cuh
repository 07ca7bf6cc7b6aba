// Backward of frame_attention, and, without values, of frame_mass. With P the probabilities and G[r,j] the
// gradient of the mass that row r has on the frame of key j (0 on keys of no frame):
//
//   dP[r,j]  = grad_out[r] . value[j] + G[r,j]
//   dS[r,j]  = P[r,j] (dP[r,j] - delta[r])
//   delta[r] = grad_out[r] . out[r] + sum_j P[r,j] G[r,j] - grad_lse[r]
//   grad_query = scale dS K,  grad_key = scale dS^T Q,  grad_value = P^T grad_out
//
// Two passes, each of which owns what it sums, so that no float is added atomically: one over rows (delta,
// grad_query: attention_backward_rows.cuh), one over keys (grad_key, grad_value; all query heads of a key head, so
// that grouped heads need no further sum: attention_backward_keys.cuh). Scores are computed again in each, and for delta once more on the keys of frames.
#pragma once
#include "attention_backward.h"
#include "attention_tiles.cuh"

namespace appo {

template <int D>
struct BackwardShape {
  static constexpr int kKeys = kKeyTile;               // of a block of the pass over keys
  static constexpr int kStepRows = D <= 64 ? 64 : 32;  // of a stage of that pass, as registers allow
  static constexpr int kStepKeys = D <= 64 ? 64 : 32;  // of a stage of the pass over rows; likewise
  static constexpr int kStages = 2;
  template <bool kWithValue>
  static constexpr size_t rows_shared_bytes() {
    return (kRows + kStages * kStepKeys) * D * 2 * (kWithValue ? 2 : 1) + kRows * sizeof(float);
  }
  template <bool kWithValue>
  static constexpr size_t keys_shared_bytes() {
    return (kKeys + kStages * kStepRows) * D * 2 * (kWithValue ? 2 : 1) +
           kStages * kStepRows * (2 * sizeof(float) + 4 * sizeof(int));
  }
};

__device__ __forceinline__ float grad_scale_of(const AttentionBackwardParams& p) {
  return p.grad_scale ? *p.grad_scale : 1.f;
}

}  // namespace appo
