// Parameters of frame_mass from a given log-sum-exp ("replay"). Strides count elements; letters as in
// attention_forward.h.
#pragma once
#include <stdint.h>

#include "frame_ids.h"
#include "visibility.h"

namespace appo {

struct FrameMassParams {
  const void* query;           // (B, Hq, R, D)
  const void* key;             // (B, Hkv, S, D)
  const float* lse;            // (B, Hq, R) contiguous, natural logarithm, over all visible keys
  const float* frame_weights;  // (B, F) contiguous, or null for ones
  float* mass;                 // (B, R, F), or (B, Hq, R, F) when per_head: added to
  Visibility visibility;
  FrameIds frames;
  int64_t query_stride_b, query_stride_h, query_stride_r;
  int64_t key_stride_b, key_stride_h, key_stride_s;
  int64_t mass_stride_b, mass_stride_h, mass_stride_r, mass_stride_f;
  int batch, query_heads, key_heads, rows, keys, frame_count, tiles;  // B, Hq, Hkv, R, S, F, T
  int frames_per_block;  // a block takes as many frames; the result does not depend on it
  int per_head;
  float scale_log2;  // scale log2(e)
  int head_dim;      // D
  int element;       // Element of query and key
};

}  // namespace appo
