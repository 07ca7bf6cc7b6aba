// The pass over keys of attention_backward.cuh: grad_key and grad_value, after the pass over rows.
#pragma once
#include "attention_backward.cuh"
#include "visibility.cuh"

namespace appo {

// Pass over keys: a block has 64 keys of one key head, 16 to a warp, and goes through the rows of all its
// query heads. Here keys are the rows of fragments, and query rows their columns.
template <class T, int D, bool kWithValue>
__global__ void __launch_bounds__(kThreads)
    attention_backward_keys(const __grid_constant__ AttentionBackwardParams p) {
  using Shape = BackwardShape<D>;
  constexpr int kKeys = Shape::kKeys, kStepRows = Shape::kStepRows, kStages = Shape::kStages,
                kTile = kStepRows * D;
  APPO_SHARED_MEMORY(memory);
  T* const key_tile = reinterpret_cast<T*>(memory);     // (kKeys, D)
  T* const query_tiles = key_tile + kKeys * D;          // (kStages, kStepRows, D)
  T* const value_tile = query_tiles + kStages * kTile;  // (kKeys, D)
  T* const grad_out_tiles = value_tile + kKeys * D;     // (kStages, kStepRows, D)
  T* const after_tiles = kWithValue ? grad_out_tiles + kStages * kTile : value_tile;
  float* const stats = reinterpret_cast<float*>(after_tiles);                  // (kStages, kStepRows, 2)
  int* const views = reinterpret_cast<int*>(stats + kStages * kStepRows * 2);  // (kStages, kStepRows, 4)

  const int first_key = blockIdx.x * kKeys, end_key = first_key + kKeys - 1, key_head = blockIdx.y,
            b = blockIdx.z;
  const int group = p.query_heads / p.key_heads, first_head = key_head * group, end_head = first_head + group;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t padded_rows = (p.rows + kRowPadding - 1) / kRowPadding * static_cast<int64_t>(kRowPadding);
  const int steps = (p.rows + kStepRows - 1) / kStepRows;
  const T* key = static_cast<const T*>(p.key) + b * p.key_stride_b + key_head * p.key_stride_h;
  const int* global_views = p.row_views + b * padded_rows * 4;

  // Whether each of the step's rows, one or two to a lane, satisfies the condition; or whether any does.
  auto row_view = [&](int step, int i) {
    const int4 v = *reinterpret_cast<const int4*>(
        global_views + (static_cast<int64_t>(step) * kStepRows + i * kWarpSize + lane) * 4);
    RowView view;
    view.first = v.x, view.last = v.y, view.prefix = v.z;
    return view;
  };
  auto seen_by_any = [&](int step) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kStepRows / kWarpSize; i++) {
      const RowView view = row_view(step, i);
      any = any || view.prefix > first_key || (view.first <= end_key && view.last >= first_key);
    }
    return __any_sync(kAllLanes, any);
  };
  auto seen_by_all = [&](int step) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kStepRows / kWarpSize; i++) {
      const RowView view = row_view(step, i);
      all = all && (view.prefix > end_key || (view.first <= first_key && view.last >= end_key));
    }
    return __all_sync(kAllLanes, all);
  };
  auto next_wanted = [&](int step) {
    while (step < steps && !seen_by_any(step)) step++;
    return step;
  };
  const int first_wanted = next_wanted(0);

  struct Place {
    int head, step, number;
  };
  auto advance = [&](Place& place) {
    place.number++;
    place.step = next_wanted(place.step + 1);
    if (place.step == steps) place.head++, place.step = first_wanted;
  };
  const Place start{first_wanted == steps ? end_head : first_head, first_wanted, 0};
  Place ahead = start;
  auto start_stage = [&] {
    if (ahead.head < end_head) {
      const int stage = ahead.number % kStages, first_row = ahead.step * kStepRows;
      const T* query = static_cast<const T*>(p.query) + b * p.query_stride_b + ahead.head * p.query_stride_h;
      load_tile<D, kStepRows>(query_tiles + stage * kTile, query, p.query_stride_r, first_row, p.rows);
      if constexpr (kWithValue) {
        const T* grad_out =
            static_cast<const T*>(p.grad_out) + b * p.grad_out_stride_b + ahead.head * p.grad_out_stride_h;
        load_tile<D, kStepRows>(grad_out_tiles + stage * kTile, grad_out, p.grad_out_stride_r, first_row,
                                p.rows);
      }
      // 16 bytes a thread: two rows of statistics, one of views.
      const float* global_stats =
          p.row_stats +
          ((static_cast<int64_t>(b) * p.query_heads + ahead.head) * padded_rows + first_row) * 2;
      const int thread = threadIdx.x;
      if (thread < kStepRows / 2)
        platform::copy_async(stats + stage * kStepRows * 2 + thread * 4, global_stats + thread * 4, true);
      if (thread < kStepRows)
        platform::copy_async(views + (stage * kStepRows + thread) * 4,
                             global_views + (first_row + thread) * 4, true);
      advance(ahead);
    }
    platform::commit_copies();
  };
  load_tile<D, kKeys>(key_tile, key, p.key_stride_s, first_key, p.keys);
  if constexpr (kWithValue) {
    const T* value = static_cast<const T*>(p.value) + b * p.value_stride_b + key_head * p.value_stride_h;
    load_tile<D, kKeys>(value_tile, value, p.value_stride_s, first_key, p.keys);
  }
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) start_stage();

  int frame[2], key_of[2];  // of this lane's two keys
#pragma unroll
  for (int half = 0; half < 2; half++) {
    key_of[half] = first_key + warp * kWarpRows + lane / 4 + 8 * half;
    frame[half] = p.frames.ids[static_cast<int64_t>(b) * p.tiles * kFrameTile + key_of[half]];
  }

  const float grad_scale = grad_scale_of(p);
  const LeftView<D> left;
  const RightView<D> right;
  float key_result[D / 8][4] = {}, value_result[kWithValue ? D / 8 : 1][4] = {};
  for (Place at = start; at.head < end_head; advance(at)) {
    platform::wait_for_copies<kStages - 2>();
    __syncthreads();
    start_stage();
    const int stage = at.number % kStages, first_row = at.step * kStepRows;
    const T* query_tile = query_tiles + stage * kTile;
    const T* grad_out_tile = grad_out_tiles + stage * kTile;
    const float* row_stats = stats + stage * kStepRows * 2;
    const int* row_views = views + stage * kStepRows * 4;
    float probability[kStepRows / 8][4] = {}, gradient[kStepRows / 8][4] = {};
    multiply_transposed<D, kStepRows>(probability, key_tile + warp * kWarpRows * D, left, query_tile, right);
    if constexpr (kWithValue)
      multiply_transposed<D, kStepRows>(gradient, value_tile + warp * kWarpRows * D, left, grad_out_tile,
                                        right);
    if (!seen_by_all(at.step)) {
#pragma unroll
      for (int i = 0; i < kStepRows / 8; i++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int4 bounds = *reinterpret_cast<const int4*>(row_views + 4 * (i * 8 + 2 * (lane % 4) + c));
          RowView view;
          view.first = bounds.x, view.last = bounds.y, view.prefix = bounds.z;
#pragma unroll
          for (int half = 0; half < 2; half++)
            if (!view.sees(key_of[half])) probability[i][2 * half + c] = -INFINITY;
        }
      }
    }
    const float* grad_mass =
        p.grad_mass ? p.grad_mass + b * p.grad_mass_stride_b + at.head * p.grad_mass_stride_h + first_row
                    : nullptr;
#pragma unroll
    for (int i = 0; i < kStepRows / 8; i++) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int r = i * 8 + 2 * (lane % 4) + c;  // of the step
        const float lse_log2 = row_stats[2 * r], delta = row_stats[2 * r + 1];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int e = 2 * half + c;
          const float weight = platform::exp2(fmaf(probability[i][e], p.scale_log2, -lse_log2));
          float dp = gradient[i][e];
          if (grad_mass && frame[half] >= 0) dp += grad_mass[frame[half] * padded_rows + r];
          probability[i][e] = weight;
          gradient[i][e] = weight * (dp - delta) * grad_scale;
        }
      }
    }
    if constexpr (kWithValue) multiply<D, kStepRows>(value_result, probability, grad_out_tile, left);
    multiply<D, kStepRows>(key_result, gradient, query_tile, left);
  }
  platform::wait_for_copies<0>();
  // The key and value tiles, of which every warp reads its own rows only, become staging areas. The barrier
  // is for blocks that no row sees: nobody has yet waited for what the other warps have copied there.
  __syncthreads();

  const int64_t offset = (static_cast<int64_t>(b) * p.key_heads + key_head) * p.keys * D;
  const int warp_key = first_key + warp * kWarpRows;
  if (p.grad_key) {
    const float factor[2] = {p.scale / grad_scale, p.scale / grad_scale};
    store_rows<D>(static_cast<T*>(p.grad_key) + offset, D, warp_key, p.keys, key_result, factor,
                  key_tile + warp * kWarpRows * D);
  }
  if constexpr (kWithValue) {
    const float factor[2] = {1.f, 1.f};
    if (p.grad_value)
      store_rows<D>(static_cast<T*>(p.grad_value) + offset, D, warp_key, p.keys, value_result, factor,
                    value_tile + warp * kWarpRows * D);
  }
}

}  // namespace appo
