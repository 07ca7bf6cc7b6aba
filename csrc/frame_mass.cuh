// frame_mass from a given log-sum-exp: P = exp(Q K^T scale - lse), summed over the keys of each frame. No
// values, no online softmax, and only tiles of keys that hold a wanted frame are visited.
//
// A block has 64 rows of one sequence and some of the frames, and goes through the query heads in order (or
// has one of them), so that the mean over heads needs no second pass and no other block adds to the same
// mass. (head, tile) pairs form one sequence of stages: the keys of the next pair, and the queries of the
// next head, travel while this one is computed with.
#pragma once
#include "attention_tiles.cuh"
#include "frame_mass.h"
#include "frame_sums.cuh"
#include "visibility.cuh"

namespace appo {

template <int D>
struct ReplayShape {
  static constexpr int kKeys = D <= 128 ? kKeyTile : 32;
  static constexpr int kStages = D <= 64 ? 3 : 2;
  static constexpr size_t shared_bytes() { return kStages * (kRows + kKeys) * D * 2; }
};

// Adds the sums of frames to the mass of this lane's two rows.
struct MassSink {
  float* mass[2];  // (F) with stride_f; null for rows that do not exist
  int64_t stride_f;
  const float* frame_weights;  // (F) or null
  float head_share;

  __device__ __forceinline__ void flush(int frame, const float (&total)[2]) {
    const float weight = frame_weights ? head_share * frame_weights[frame] : head_share;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float sum = quad_sum(total[half]);
      if (threadIdx.x % 4 == 0 && mass[half]) mass[half][frame * stride_f] += sum * weight;
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads) frame_mass_replay(const __grid_constant__ FrameMassParams p) {
  using Shape = ReplayShape<D>;
  constexpr int kKeys = Shape::kKeys, kStages = Shape::kStages;
  constexpr int kTile = kKeys * D;
  APPO_SHARED_MEMORY(memory);
  // One query tile per stage too: where a head has a single tile of keys, each stage is of another head.
  T* const query_tiles = reinterpret_cast<T*>(memory);     // (kStages, kRows, D): head h in h % kStages
  T* const key_tiles = query_tiles + kStages * kRows * D;  // (kStages, kKeys, D)

  const int row_tiles = (p.rows + kRows - 1) / kRows;
  const int first_row = blockIdx.x % row_tiles * kRows, b = blockIdx.z;
  const int first_frame = blockIdx.x / row_tiles * p.frames_per_block;
  const int end_frame = min(first_frame + p.frames_per_block, p.frame_count);
  const int first_head = p.per_head ? blockIdx.y : 0, end_head = p.per_head ? first_head + 1 : p.query_heads;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int* frame_ids = p.frames.ids + static_cast<int64_t>(b) * p.tiles * kFrameTile;
  const int* frame_ranges = p.frames.range + static_cast<int64_t>(b) * p.tiles * 2;

  TileList<kKeys> list;
  list.template find<kRows>(p.visibility, b, first_row, p.rows, p.keys);
  const int tile_count = list.count();
  // The first tile from `index` on that can hold one of this block's frames.
  auto next_wanted = [&](int index) {
    for (; index < tile_count; index++) {
      const int2 range = frame_range<kKeys>(frame_ranges, list.tile(index));
      if (range.y >= first_frame && range.x < end_frame) break;
    }
    return index;
  };
  const int first_wanted = next_wanted(0);
  if (first_wanted == tile_count) return;

  // A place in the sequence of (head, tile) pairs.
  struct Place {
    int head, index, number;
  };
  auto advance = [&](Place& place) {
    place.number++;
    place.index = next_wanted(place.index + 1);
    if (place.index == tile_count) place.head++, place.index = first_wanted;
  };
  Place ahead{first_head, first_wanted, 0};
  auto start_stage = [&] {
    if (ahead.head < end_head) {
      const int key_head = ahead.head / (p.query_heads / p.key_heads);
      const T* key = static_cast<const T*>(p.key) + b * p.key_stride_b + key_head * p.key_stride_h;
      if (ahead.index == first_wanted) {
        const T* query =
            static_cast<const T*>(p.query) + b * p.query_stride_b + ahead.head * p.query_stride_h;
        load_tile<D, kRows>(query_tiles + ahead.head % kStages * kRows * D, query, p.query_stride_r,
                            first_row, p.rows);
      }
      load_tile<D, kKeys>(key_tiles + ahead.number % kStages * kTile, key, p.key_stride_s,
                          list.tile(ahead.index) * kKeys, p.keys);
      advance(ahead);
    }
    platform::commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) start_stage();

  RowView view[2];
  MassSink sink{{nullptr, nullptr},
                p.mass_stride_f,
                p.frame_weights ? p.frame_weights + static_cast<int64_t>(b) * p.frame_count : nullptr,
                1.f / static_cast<float>(end_head - first_head)};
  int row[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    row[half] = first_row + warp * kWarpRows + lane / 4 + 8 * half;
    if (row[half] >= p.rows) continue;
    view[half].load(p.visibility, static_cast<int64_t>(b) * p.rows + row[half], p.keys);
    sink.mass[half] =
        p.mass + b * p.mass_stride_b + first_head * p.mass_stride_h + row[half] * p.mass_stride_r;
  }

  const LeftView<D> left;
  const RightView<D> right;
  CarriedFrame carried;
  float lse_log2[2];
  for (Place at{first_head, first_wanted, 0}; at.head < end_head;) {
    platform::wait_for_copies<kStages - 2>();
    __syncthreads();
    start_stage();
    const bool first_of_head = at.index == first_wanted;
    if (first_of_head) {
      carried.flush(sink);  // the sums of heads are added one after the other
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t index = (static_cast<int64_t>(b) * p.query_heads + at.head) * p.rows + row[half];
        const float lse = row[half] < p.rows ? p.lse[index] : INFINITY;
        lse_log2[half] =
            lse == -INFINITY ? INFINITY : lse * kLog2E;  // a row that sees no key has probabilities of 0
      }
    }
    const int tile = list.tile(at.index);
    float score[kKeys / 8][4] = {};
    multiply_transposed<D, kKeys>(score, query_tiles + (at.head % kStages * kRows + warp * kWarpRows) * D,
                                  left, key_tiles + at.number % kStages * kTile, right);
    if (!list.seen_by_all(tile)) hide_unseen<kKeys>(score, view, tile * kKeys);
    float part[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        score[i][e] = platform::exp2(fmaf(score[i][e], p.scale_log2, -lse_log2[e / 2]));
        part[e / 2] += score[i][e];
      }
    }
    const int2 range = frame_range<kKeys>(frame_ranges, tile);
    carried.template add_tile<kKeys>(frame_ids, tile * kKeys, range, first_frame, end_frame, score, part,
                                     sink);
    advance(at);
  }
  platform::wait_for_copies<0>();
  carried.flush(sink);
}

}  // namespace appo
