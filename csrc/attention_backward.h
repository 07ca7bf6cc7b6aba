// Parameters of the backward passes of frame_attention and frame_mass. Letters as in attention_forward.h;
// Rp is R rounded up to kRowPadding. Strides count elements.
#pragma once
#include <stdint.h>

#include "frame_ids.h"
#include "visibility.h"

namespace appo {

constexpr int kRowPadding = 64;

struct AttentionBackwardParams {
  const void* query;         // (B, Hq, R, D)
  const void* key;           // (B, Hkv, S, D)
  const void* value;         // (B, Hkv, S, D); null without a gradient of `out`
  const void* out;           // (B, Hq, R, D); null likewise
  const void* grad_out;      // (B, Hq, R, D); null likewise
  const float* lse;          // (B, Hq, R) contiguous, natural logarithm
  const float* grad_lse;     // (B, Hq, R) contiguous, or null
  const float* grad_mass;    // (B or B Hq, F, Rp): gradient of each head's sum of each frame; null: none
  const float* grad_scale;   // (1,): factor of d loss / d score when rounded to the element type; null: 1
  float* row_stats;          // (B, Hq, Rp, 2) contiguous: lse log2(e) and delta, from the first pass to the second
  int* row_views;            // (B, Rp, 4) contiguous: first, last, prefix of each row, likewise
  void* grad_query;          // (B, Hq, R, D) contiguous, or null
  void* grad_key;            // (B, Hkv, S, D) contiguous, or null
  void* grad_value;          // (B, Hkv, S, D) contiguous, or null
  Visibility visibility;
  FrameIds frames;
  int64_t query_stride_b, query_stride_h, query_stride_r;
  int64_t key_stride_b, key_stride_h, key_stride_s;
  int64_t value_stride_b, value_stride_h, value_stride_s;
  int64_t out_stride_b, out_stride_h, out_stride_r;
  int64_t grad_out_stride_b, grad_out_stride_h, grad_out_stride_r;
  int64_t grad_mass_stride_b, grad_mass_stride_h;                     // of (F, Rp) pieces
  int batch, query_heads, key_heads, rows, keys, frame_count, tiles;  // B, Hq, Hkv, R, S, F, T
  float scale_log2;                                                   // scale log2(e)
  float scale;
  int head_dim;  // D: 64 or 128
  int element;   // Element of all tensors of 16-bit elements
};

}  // namespace appo
