// Parameters of the flash-style forward pass that also sums each frame, and of the mean over heads that
// follows it. Strides count elements. B sequences, Hq / Hkv query / key-value heads, R rows, S keys, D head
// size, F frames, T tiles of keys.
#pragma once
#include <stdint.h>

#include "frame_ids.h"
#include "visibility.h"

namespace appo {

struct AttentionForwardParams {
  const void* query;  // (B, Hq, R, D)
  const void* key;    // (B, Hkv, S, D)
  const void* value;  // (B, Hkv, S, D); null without values
  void* out;          // (B, Hq, R, D); null without values
  float* lse;         // (B, Hq, R) contiguous, natural logarithm
  float* sums;        // (B, Hq, R, F) contiguous: the mass per head when the pass is done
  float* maxima;      // (B, Hq, R, F) contiguous, scratch: what the sums are relative to
  Visibility visibility;
  FrameIds frames;
  int64_t query_stride_b, query_stride_h, query_stride_r;
  int64_t key_stride_b, key_stride_h, key_stride_s;
  int64_t value_stride_b, value_stride_h, value_stride_s;
  int64_t out_stride_b, out_stride_h, out_stride_r;
  int batch, query_heads, key_heads, rows, keys, frame_count, tiles;  // B, Hq, Hkv, R, S, F, T
  float scale_log2;  // scale log2(e): scores in units of powers of 2
  int head_dim;      // D
  int element;       // Element of query, key, value, out
};

struct HeadMeanParams {
  const float* per_head;       // (B, Hq, R, F) contiguous
  const float* frame_weights;  // (B, F) contiguous, or null for ones
  float* mass;                 // (B, R, F), or (B, Hq, R, F) when kept_heads = Hq: added to
  int64_t mass_stride_b, mass_stride_h, mass_stride_r, mass_stride_f;
  int64_t batch, query_heads, kept_heads, rows, frame_count;  // B, Hq, 1 or Hq, R, F
};

}  // namespace appo
