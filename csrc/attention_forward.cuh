// One flash-style pass over the keys: softmax(Q K^T scale) V, its log-sum-exp, and the share of every frame,
// per query head. Without values it is the one-pass form of frame_mass.
//
// A block has 64 rows of one query head. Tiles of keys and values travel through a ring of stages: while one
// is computed with, the next are on their way. With one barrier an iteration, after which (1) the stage to
// read has landed for all threads and (2) the stage to overwrite has been read by all.
//
// Online softmax keeps, per row, the largest score so far (row_max) and sum exp(score - row_max). A frame's sum is
// kept likewise, relative to the row_max at the time of its last key, and corrected once at the end.
#pragma once
#include <float.h>

#include "attention_forward.h"
#include "attention_tiles.cuh"
#include "frame_sums.cuh"
#include "visibility.cuh"

namespace appo {

template <int D>
struct ForwardShape {
  static constexpr int kKeys = D <= 128 ? kKeyTile : 32;  // D = 256: registers and the 99 KiB of sm_86 and sm_89
  static constexpr int kStages = D <= 64 ? 3 : 2;
  static constexpr bool kQueryInRegisters = D <= 128;
  template <bool kWithValue>
  static constexpr size_t shared_bytes() {
    return (kRows + kStages * kKeys * (kWithValue ? 2 : 1)) * D * 2;
  }
};

// Where the sums of frames of this lane's two rows go: to global memory, which no other thread writes. Only
// one lane of each quad writes a row.
struct OnlineFrameSink {
  const AttentionForwardParams& p;
  int64_t first;  // of the F sums of the upper row; the lower one is 8 rows further
  int existing;   // how many of the two rows exist
  const float (&row_max)[2];

  __device__ __forceinline__ int64_t index(int half, int frame) const {
    return first + half * 8 * p.frame_count + frame;
  }
  __device__ __forceinline__ void flush(int frame, const float (&total)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float sum = quad_sum(total[half]);
      if (threadIdx.x % 4 != 0 || half >= existing || sum == 0.f) continue;
      const int64_t i = index(half, frame);
      const float before = p.sums[i] * platform::exp2(p.maxima[i] - row_max[half]);  // 0 the first time: row_max -inf
      p.sums[i] = before + sum;
      p.maxima[i] = row_max[half];
    }
  }
};

template <class T, int D, bool kWithValue>
__global__ void __launch_bounds__(kThreads)
    attention_forward(const __grid_constant__ AttentionForwardParams p) {
  using Shape = ForwardShape<D>;
  constexpr int kKeys = Shape::kKeys, kStages = Shape::kStages;
  constexpr int kTile = kKeys * D;
  APPO_SHARED_MEMORY(memory);
  T* const query_tile = reinterpret_cast<T*>(memory);  // (kRows, D)
  T* const key_tiles = query_tile + kRows * D;         // (kStages, kKeys, D)
  T* const value_tiles = key_tiles + kStages * kTile;  // (kStages, kKeys, D)

  const int first_row = blockIdx.x * kRows, h = blockIdx.y, b = blockIdx.z;
  const int key_head = h / (p.query_heads / p.key_heads);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const T* query = static_cast<const T*>(p.query) + b * p.query_stride_b + h * p.query_stride_h;
  const T* key = static_cast<const T*>(p.key) + b * p.key_stride_b + key_head * p.key_stride_h;
  const T* value = static_cast<const T*>(p.value) + b * p.value_stride_b + key_head * p.value_stride_h;
  const int* frame_ids = p.frames.ids + static_cast<int64_t>(b) * p.tiles * kFrameTile;
  const int* frame_ranges = p.frames.range + static_cast<int64_t>(b) * p.tiles * 2;

  TileList<kKeys> list;
  list.template find<kRows>(p.visibility, b, first_row, p.rows, p.keys);
  const int tile_count = list.count();

  auto start_stage = [&](int index, int stage) {
    if (index < tile_count) {
      const int at = list.tile(index) * kKeys;
      load_tile<D, kKeys>(key_tiles + stage * kTile, key, p.key_stride_s, at, p.keys);
      if constexpr (kWithValue)
        load_tile<D, kKeys>(value_tiles + stage * kTile, value, p.value_stride_s, at, p.keys);
    }
    platform::commit_copies();  // empty groups too: the waits below count them
  };
  load_tile<D, kRows>(query_tile, query, p.query_stride_r, first_row, p.rows);
#pragma unroll
  for (int index = 0; index < kStages - 1; index++) start_stage(index, index);

  RowView view[2];
  // Scores and maxima in powers of 2. A row_max starts below all scores but finite: a key that is not seen has
  // exp2(-inf - row_max) = 0.
  float row_max[2] = {-FLT_MAX, -FLT_MAX}, row_sum[2] = {0.f, 0.f};
  const int row = first_row + warp * kWarpRows + lane / 4;  // the upper of this lane's two
  const int64_t row_index = (static_cast<int64_t>(b) * p.query_heads + h) * p.rows + row;
  OnlineFrameSink sink{p, row_index * p.frame_count, (row < p.rows) + (row + 8 < p.rows), row_max};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (half >= sink.existing) continue;
    view[half].load(p.visibility, static_cast<int64_t>(b) * p.rows + row + 8 * half, p.keys);
    for (int f = lane % 4; f < p.frame_count; f += 4)
      p.sums[sink.index(half, f)] = 0.f, p.maxima[sink.index(half, f)] = -INFINITY;
  }
  __syncwarp();  // the four lanes of a quad have written what one of them will read

  CarriedFrame carried;
  RowFragments<Shape::kQueryInRegisters ? D : 16, T> query_rows;
  float result[D / 8][4] = {};

  const LeftView<D> left;
  const RightView<D> right;
  if constexpr (Shape::kQueryInRegisters) {
    platform::wait_for_copies<kStages - 2>();
    __syncthreads();
    query_rows.load(query_tile + warp * kWarpRows * D, left);
  }
  for (int index = 0, stage = 0, free_stage = kStages - 1; index < tile_count; index++) {
    platform::wait_for_copies<kStages - 2>();
    __syncthreads();
    start_stage(index + kStages - 1, free_stage);
    const int tile = list.tile(index);
    const T* key_tile = key_tiles + stage * kTile;

    float score[kKeys / 8][4] = {};
    if constexpr (Shape::kQueryInRegisters) {
      multiply_transposed<D, kKeys>(score, query_rows, key_tile, right);
    } else {
      multiply_transposed<D, kKeys>(score, query_tile + warp * kWarpRows * D, left, key_tile, right);
    }
    if (!list.seen_by_all(tile)) hide_unseen<kKeys>(score, view, tile * kKeys);

    float part[2] = {0.f, 0.f};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int i = 0; i < kKeys / 8; i++)
        tile_max = fmaxf(tile_max, fmaxf(score[i][2 * half], score[i][2 * half + 1]));
      const float new_max = fmaxf(row_max[half], quad_max(tile_max) * p.scale_log2);
      const float correction = platform::exp2(row_max[half] - new_max);
      row_max[half] = new_max;
#pragma unroll
      for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          score[i][e] = platform::exp2(fmaf(score[i][e], p.scale_log2, -new_max));
          part[half] += score[i][e];
        }
      }
      row_sum[half] = row_sum[half] * correction + part[half];
      carried.total[half] *= correction;
      if constexpr (kWithValue) {
#pragma unroll
        for (int i = 0; i < D / 8; i++)
          result[i][2 * half] *= correction, result[i][2 * half + 1] *= correction;
      }
    }
    const int2 range = frame_range<kKeys>(frame_ranges, tile);
    carried.template add_tile<kKeys>(frame_ids, tile * kKeys, range, 0, p.frame_count, score, part, sink);
    if constexpr (kWithValue) multiply<D, kKeys>(result, score, value_tiles + stage * kTile, left);
    free_stage = stage;
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  platform::wait_for_copies<0>();
  carried.flush(sink);
  __syncwarp();

  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    row_sum[half] = quad_sum(row_sum[half]);
    const bool sees = row_sum[half] > 0.f;
    inverse[half] = sees ? 1.f / row_sum[half] : 0.f;
    if (half >= sink.existing) continue;
    if (lane % 4 == 0) p.lse[row_index + 8 * half] = sees ? row_max[half] * kLn2 + logf(row_sum[half]) : -INFINITY;
    for (int f = lane % 4; f < p.frame_count; f += 4) {
      const int64_t i = sink.index(half, f);
      p.sums[i] = p.sums[i] == 0.f ? 0.f : p.sums[i] * platform::exp2(p.maxima[i] - row_max[half]) * inverse[half];
    }
  }
  if constexpr (kWithValue) {
    T* out = static_cast<T*>(p.out) + b * p.out_stride_b + h * p.out_stride_h;
    // The query tile, of which every warp reads its own rows only, becomes the staging area. The barrier is
    // for blocks that see no key: nobody has yet waited for what the other warps have copied there.
    __syncthreads();
    store_rows<D>(out, p.out_stride_r, first_row + warp * kWarpRows, p.rows, result, inverse,
                  query_tile + warp * kWarpRows * D);
  }
}

}  // namespace appo
