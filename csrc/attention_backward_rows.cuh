// The pass over rows of attention_backward.cuh: delta and grad_query.
#pragma once
#include "attention_backward.cuh"
#include "frame_sums.cuh"
#include "visibility.cuh"

namespace appo {

// grad_out . out of rows first_row .. first_row + 63, into `dots`: two threads a row.
template <class T, int D>
__device__ __forceinline__ void row_dots(const T* grad_out, int64_t grad_stride, const T* out,
                                         int64_t out_stride, int first_row, int rows, float* dots) {
  const int row = first_row + threadIdx.x / 2;
  float dot = 0.f;
  if (row < rows) {
    for (int chunk = threadIdx.x % 2; chunk < D / kChunkElements; chunk += 2) {
      Vector<T> a, b;
      a.bits = platform::load_16_bytes(grad_out + row * grad_stride + chunk * kChunkElements);
      b.bits = platform::load_16_bytes(out + row * out_stride + chunk * kChunkElements);
#pragma unroll
      for (int i = 0; i < kChunkElements; i++) dot += to_float(a.element[i]) * to_float(b.element[i]);
    }
  }
  dot += __shfl_xor_sync(kAllLanes, dot, 1);
  if (threadIdx.x % 2 == 0) dots[threadIdx.x / 2] = dot;
}

// Pass over rows: a block has 64 rows of one query head. Two blocks on a multiprocessor: for three, registers
// spill on sm_100.
template <class T, int D, bool kWithValue>
__global__ void __launch_bounds__(kThreads, 2)
    attention_backward_rows(const __grid_constant__ AttentionBackwardParams p) {
  using Shape = BackwardShape<D>;
  constexpr int kKeys = Shape::kStepKeys, kStages = Shape::kStages, kTile = kKeys * D;
  APPO_SHARED_MEMORY(memory);
  T* const query_tile = reinterpret_cast<T*>(memory);    // (kRows, D)
  T* const key_tiles = query_tile + kRows * D;           // (kStages, kKeys, D)
  T* const grad_out_tile = key_tiles + kStages * kTile;  // (kRows, D)
  T* const value_tiles = grad_out_tile + kRows * D;      // (kStages, kKeys, D)
  float* const dots =
      reinterpret_cast<float*>(kWithValue ? value_tiles + kStages * kTile : grad_out_tile);  // (kRows)

  const int first_row = blockIdx.x * kRows, h = blockIdx.y, b = blockIdx.z;
  const int key_head = h / (p.query_heads / p.key_heads);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t padded_rows = gridDim.x * static_cast<int64_t>(kRows),
                head_index = static_cast<int64_t>(b) * p.query_heads + h;
  const T* query = static_cast<const T*>(p.query) + b * p.query_stride_b + h * p.query_stride_h;
  const T* key = static_cast<const T*>(p.key) + b * p.key_stride_b + key_head * p.key_stride_h;
  const T* value = static_cast<const T*>(p.value) + b * p.value_stride_b + key_head * p.value_stride_h;
  const int* frame_ids = p.frames.ids + static_cast<int64_t>(b) * p.tiles * kFrameTile;
  const int* frame_ranges = p.frames.range + static_cast<int64_t>(b) * p.tiles * 2;
  const float* grad_mass =
      p.grad_mass ? p.grad_mass + b * p.grad_mass_stride_b + h * p.grad_mass_stride_h : nullptr;

  TileList<kKeys> list;
  list.template find<kRows>(p.visibility, b, first_row, p.rows, p.keys);
  const int tile_count = list.count();

  // Two rounds through the same code: the first, over the keys of frames, for their part of delta; the
  // second, over all visible keys, for the gradient. Each has its own sequence of stages.
  const int first_round = grad_mass ? 0 : 1, end_round = p.grad_query ? 2 : 1;
  const bool any_round = first_round < end_round;  // else delta needs no keys, and only delta is wanted

  if (any_round) load_tile<D, kRows>(query_tile, query, p.query_stride_r, first_row, p.rows);
  if constexpr (kWithValue) {
    const T* grad_out = static_cast<const T*>(p.grad_out) + b * p.grad_out_stride_b + h * p.grad_out_stride_h;
    const T* out = static_cast<const T*>(p.out) + b * p.out_stride_b + h * p.out_stride_h;
    if (any_round) load_tile<D, kRows>(grad_out_tile, grad_out, p.grad_out_stride_r, first_row, p.rows);
    row_dots<T, D>(grad_out, p.grad_out_stride_r, out, p.out_stride_r, first_row, p.rows, dots);
  }

  RowView view[2];
  int row[2];
  float lse_log2[2], delta[2] = {0.f, 0.f};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    row[half] = first_row + warp * kWarpRows + lane / 4 + 8 * half;
    lse_log2[half] = INFINITY;  // probabilities of 0
    if (row[half] >= p.rows) continue;
    view[half].load(p.visibility, static_cast<int64_t>(b) * p.rows + row[half], p.keys);
    const float lse = p.lse[head_index * p.rows + row[half]];
    lse_log2[half] = lse == -INFINITY ? INFINITY : lse * kLog2E;
  }

  // To be called once, when this lane's part of the sum over keys of frames is complete.
  auto finish_delta = [&] {
    if constexpr (kWithValue) __syncwarp();  // a row's `dots` are written and read in one warp
#pragma unroll
    for (int half = 0; half < 2; half++) {
      delta[half] = quad_sum(delta[half]);
      if constexpr (kWithValue) delta[half] += dots[row[half] - first_row];
      if (p.grad_lse && row[half] < p.rows) delta[half] -= p.grad_lse[head_index * p.rows + row[half]];
      if (lane % 4 != 0) continue;
      float* stats = p.row_stats + (head_index * padded_rows + row[half]) * 2;
      stats[0] = lse_log2[half], stats[1] = delta[half];
      if (h != 0) continue;
      int* view_row = p.row_views + (b * padded_rows + row[half]) * 4;
      view_row[0] = view[half].first, view_row[1] = view[half].last, view_row[2] = view[half].prefix,
      view_row[3] = 0;
    }
  };
  const float grad_scale = grad_scale_of(p);
  const LeftView<D> left;
  const RightView<D> right;
  float result[D / 8][4] = {};
#pragma unroll 1
  for (int round = first_round; round < end_round; round++) {
    auto next_wanted = [&](int index) {
      while (round == 0 && index < tile_count && frame_range<kKeys>(frame_ranges, list.tile(index)).y < 0)
        index++;
      return index;
    };
    int ahead = next_wanted(0), number_ahead = 0;
    auto start_stage = [&] {
      if (ahead < tile_count) {
        const int at = list.tile(ahead) * kKeys, stage = number_ahead++ % kStages;
        load_tile<D, kKeys>(key_tiles + stage * kTile, key, p.key_stride_s, at, p.keys);
        if (kWithValue && round == 1)
          load_tile<D, kKeys>(value_tiles + stage * kTile, value, p.value_stride_s, at, p.keys);
        ahead = next_wanted(ahead + 1);
      }
      platform::commit_copies();
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; i++) start_stage();
    if (round == 1) finish_delta();
    int number = 0;
    for (int index = next_wanted(0); index < tile_count; index = next_wanted(index + 1)) {
      platform::wait_for_copies<kStages - 2>();
      __syncthreads();
      start_stage();
      const int tile = list.tile(index), stage = number++ % kStages;
      float score[kKeys / 8][4] = {}, gradient[kKeys / 8][4] = {};
      multiply_transposed<D, kKeys>(score, query_tile + warp * kWarpRows * D, left, key_tiles + stage * kTile,
                                    right);
      if (!list.seen_by_all(tile)) hide_unseen<kKeys>(score, view, tile * kKeys);
#pragma unroll
      for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++)
          score[i][e] = platform::exp2(fmaf(score[i][e], p.scale_log2, -lse_log2[e / 2]));
      }
      if constexpr (kWithValue) {
        if (round == 1)
          multiply_transposed<D, kKeys>(gradient, grad_out_tile + warp * kWarpRows * D, left,
                                        value_tiles + stage * kTile, right);
      }
      if (grad_mass && frame_range<kKeys>(frame_ranges, tile).y >= 0) {
        TileFrames<kKeys> frames;
        frames.load(frame_ids + tile * kKeys);
#pragma unroll
        for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int f = frames.id[i][e % 2];
            if (f >= 0) gradient[i][e] += grad_mass[f * padded_rows + row[e / 2]];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          if (round == 0) {
            delta[e / 2] += score[i][e] * gradient[i][e];
          } else {
            gradient[i][e] = score[i][e] * (gradient[i][e] - delta[e / 2]) * grad_scale;
          }
        }
      }
      if (round == 1) multiply<D, kKeys>(result, gradient, key_tiles + stage * kTile, left);
    }
    platform::wait_for_copies<0>();
    __syncthreads();  // all stages are free again
  }
  if (!p.grad_query) {
    finish_delta();
    return;
  }
  const float factor[2] = {p.scale / grad_scale, p.scale / grad_scale};
  T* grad_query = static_cast<T*>(p.grad_query) + head_index * p.rows * D;
  store_rows<D>(grad_query, D, first_row + warp * kWarpRows, p.rows, result, factor,
                query_tile + warp * kWarpRows * D);
}

}  // namespace appo
