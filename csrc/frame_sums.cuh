// Sums over the keys of each frame, for the two rows of a lane, from fragments of 16 rows x kKeys keys.
//
// Frames may lie anywhere, but mostly a tile lies within one frame, and the next tile in the same: its sum is
// carried in registers and handed on (flushed) when another frame comes. The order of additions depends on
// the row and its keys only.
#pragma once
#include <limits.h>

#include "attention_tiles.cuh"
#include "frame_ids.h"

namespace appo {

constexpr int kNoFrame = -1;

// The smallest and largest id in a tile of kKeys keys, of a sequence's `ranges`. kKeys is 1 or 2 times
// kFrameTile, and `tile` counts tiles of kKeys.
template <int kKeys>
__device__ __forceinline__ int2 frame_range(const int* ranges, int tile) {
  static_assert(kKeys == kFrameTile || kKeys == 2 * kFrameTile, "");
  int2 result;
  if constexpr (kKeys == kFrameTile) {
    result = reinterpret_cast<const int2*>(ranges)[tile];
  } else {
    const int4 both = reinterpret_cast<const int4*>(ranges)[tile];
    result.x = min(both.x, both.z), result.y = max(both.y, both.w);
  }
  return result;
}

// This lane's columns of a tile.
template <int kKeys>
struct TileFrames {
  int id[kKeys / 8][2];

  __device__ __forceinline__ void load(const int* ids) {
    const int pair = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < kKeys / 8; i++) {
      const int2 two = *reinterpret_cast<const int2*>(ids + i * 8 + pair);
      id[i][0] = two.x, id[i][1] = two.y;
    }
  }
  // The smallest id in the tile that is greater than `after`, INT_MAX if there is none. The same for the
  // whole warp.
  __device__ __forceinline__ int next(int after) const {
    int best = INT_MAX;
#pragma unroll
    for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
      for (int c = 0; c < 2; c++)
        if (id[i][c] > after) best = min(best, id[i][c]);
    }
    best = min(best, __shfl_xor_sync(kAllLanes, best, 1));
    return min(best, __shfl_xor_sync(kAllLanes, best, 2));
  }
  __device__ __forceinline__ void sum(int frame, const float (&weights)[kKeys / 8][4],
                                      float (&total)[2]) const {
    total[0] = total[1] = 0.f;
#pragma unroll
    for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        total[0] += id[i][c] == frame ? weights[i][c] : 0.f;
        total[1] += id[i][c] == frame ? weights[i][2 + c] : 0.f;
      }
    }
  }
};

// The frame whose sum is being carried. A sink has flush(frame, totals of the two rows in this lane); all
// lanes call it.
struct CarriedFrame {
  int frame = kNoFrame;
  float total[2] = {0.f, 0.f};

  template <class Sink>
  __device__ __forceinline__ void flush(Sink& sink) {
    if (frame == kNoFrame) return;
    sink.flush(frame, total);
    frame = kNoFrame;
  }
  template <class Sink>
  __device__ __forceinline__ void add(int new_frame, const float (&part)[2], Sink& sink) {
    if (new_frame != frame) {
      flush(sink);
      frame = new_frame;
      total[0] = part[0], total[1] = part[1];
    } else {
      total[0] += part[0], total[1] += part[1];
    }
  }
  // One tile, whose keys are those from first_key on, with ids in the given range. `weights` are those of its
  // keys, 0 where a row does not see one; `row_total` their sums over this lane's columns. Frames outside
  // [begin, end) are left out.
  template <int kKeys, class Sink>
  __device__ __forceinline__ void add_tile(const int* ids, unsigned first_key, int2 range, int begin, int end,
                                           const float (&weights)[kKeys / 8][4], const float (&row_total)[2],
                                           Sink& sink) {
    if (range.x == range.y) {
      if (range.x >= begin && range.x < end) add(range.x, row_total, sink);
      return;
    }
    TileFrames<kKeys> mixed;
    mixed.load(ids + first_key);
    for (int f = mixed.next(begin - 1); f < end; f = mixed.next(f)) {
      float part[2];
      mixed.sum(f, weights, part);
      add(f, part, sink);
    }
  }
};

}  // namespace appo
