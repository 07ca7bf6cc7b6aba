// Which keys a row sees: first <= key <= last, or key < prefix; and which tiles of keys a block of rows must
// visit.
#pragma once
#include <limits.h>
#include <math.h>

#include "platform.h"
#include "visibility.h"

namespace appo {

struct RowView {
  int first = INT_MAX, last = -1, prefix = 0;  // sees nothing

  __device__ __forceinline__ void load(const Visibility& v, int64_t index, int keys) {
    first = v.first_key ? max(v.first_key[index], 0) : 0;
    last = v.last_key ? min(v.last_key[index], keys - 1) : keys - 1;
    prefix = v.prefix_keys ? min(v.prefix_keys[index], keys) : 0;
    if (first > last) first = INT_MAX, last = -1;
  }
  __device__ __forceinline__ bool sees(int key) const {
    return (key >= first && key <= last) || key < prefix;
  }
};

// Gives the scores of keys that a lane's two rows do not see the probability 0. The tile's keys are those
// from first_key on.
template <int kKeys>
__device__ __forceinline__ void hide_unseen(float (&score)[kKeys / 8][4], const RowView (&view)[2],
                                            int first_key) {
#pragma unroll
  for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (!view[e / 2].sees(first_key + i * 8 + 2 * (threadIdx.x % 4) + e % 2)) score[i][e] = -INFINITY;
    }
  }
}

// The tiles that some of a range of rows see: [0, prefix_end) and [begin, end). Every warp finds them for
// itself.
template <int kKeys>
struct TileList {
  int prefix_end, begin, end;
  // Keys in [first_of_all, last_of_all] or below prefix_of_all are seen by every row.
  int first_of_all, last_of_all, prefix_of_all;

  // Rows first_row .. first_row + kListRows - 1 of sequence b, of R; all lanes of the warp take part.
  template <int kListRows>
  __device__ __forceinline__ void find(const Visibility& v, int64_t b, int first_row, int R, int keys) {
    int min_first = INT_MAX, max_last = -1, max_prefix = 0;
    first_of_all = 0, last_of_all = INT_MAX, prefix_of_all = INT_MAX;
    for (int row = first_row + threadIdx.x % 32; row < min(first_row + kListRows, R); row += 32) {
      RowView view;
      view.load(v, b * R + row, keys);
      min_first = min(min_first, view.first), first_of_all = max(first_of_all, view.first);
      max_last = max(max_last, view.last), last_of_all = min(last_of_all, view.last);
      max_prefix = max(max_prefix, view.prefix), prefix_of_all = min(prefix_of_all, view.prefix);
    }
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) {
      min_first = min(min_first, __shfl_xor_sync(0xffffffffu, min_first, lanes));
      first_of_all = max(first_of_all, __shfl_xor_sync(0xffffffffu, first_of_all, lanes));
      max_last = max(max_last, __shfl_xor_sync(0xffffffffu, max_last, lanes));
      last_of_all = min(last_of_all, __shfl_xor_sync(0xffffffffu, last_of_all, lanes));
      max_prefix = max(max_prefix, __shfl_xor_sync(0xffffffffu, max_prefix, lanes));
      prefix_of_all = min(prefix_of_all, __shfl_xor_sync(0xffffffffu, prefix_of_all, lanes));
    }
    prefix_end = (max(max_prefix, 0) + kKeys - 1) / kKeys;
    begin = max_last < 0 ? prefix_end : max(min_first / kKeys, prefix_end);
    end = max_last < 0 ? prefix_end : max(max_last / kKeys + 1, begin);
  }
  __device__ __forceinline__ int count() const { return prefix_end + end - begin; }
  __device__ __forceinline__ int tile(int index) const {
    return index < prefix_end ? index : index - prefix_end + begin;
  }
  // Whether each row sees each key of the tile: then nothing has to be masked.
  __device__ __forceinline__ bool seen_by_all(int tile) const {
    const int from = tile * kKeys, to = from + kKeys - 1;
    return (first_of_all <= from && to <= last_of_all) || to < prefix_of_all;
  }
};

}  // namespace appo
