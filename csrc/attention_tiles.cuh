// What the attention kernels share: tiles in shared memory, their fragments, and the products of tiles.
//
// A block has 4 warps and 64 query rows, 16 to a warp. In the fragment of an mma, lane l holds of each 16 x 8 result the
// elements (l / 4, 2 (l % 4)), the next column, and the same columns 8 rows below: a lane has two rows, and the four lanes
// of a quad share them.
#pragma once
#include "numbers.cuh"

namespace appo {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 64;                     // query rows of a block
constexpr int kWarpRows = kRows / kWarps;     // 16: the rows of one mma
constexpr int kChunkElements = 8;             // 16 bytes of 16-bit elements

// Offset in elements of a 16-byte chunk of a row in a tile of rows of D elements. Chunks are permuted within a row so that
// the 8 rows of one matrix of ldmatrix lie in 8 different groups of 4 banks: the row's low bits that its pitch does not
// already spread over the banks are folded into the chunk.
template <int D>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  constexpr int kChunks = D / kChunkElements;
  constexpr int kBits = kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : kChunks % 2 == 0 ? 1 : 0;
  static_assert(kBits > 0, "a row must be a multiple of 32 bytes");
  return row * D + (chunk ^ (row >> (3 - kBits) & ((1 << kBits) - 1))) * kChunkElements;
}

// Starts copying rows first .. first + kTileRows - 1 of a matrix of `rows` rows; those beyond it become zeros.
template <int D, int kTileRows, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* matrix, int64_t stride, int first, int rows) {
  constexpr int kChunks = D / kChunkElements;
  static_assert(kTileRows * kChunks % kThreads == 0, "every thread copies the same number of chunks");
#pragma unroll
  for (int i = 0; i < kTileRows * kChunks / kThreads; i++) {
    const int index = i * kThreads + threadIdx.x, row = index / kChunks, chunk = index % kChunks;
    const bool present = first + row < rows;
    const T* source = matrix + (present ? first + row : 0) * stride + chunk * kChunkElements;
    platform::copy_async(tile + tile_offset<D>(row, chunk), source, present);
  }
}

// The fragments of this warp's 16 rows of a tile, as the left operand of a product over D.
template <int D, class T>
struct RowFragments {
  uint32_t part[D / 16][4];
  __device__ __forceinline__ void load(const T* tile, int first_row) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < D / 16; k++) platform::load_matrix_x4(part[k], tile + tile_offset<D>(first_row + lane % 16, 2 * k + lane / 16));
  }
};

// result (16 x kKeys) += rows (16 x D) tile (kKeys x D)^T; the rows' fragments come from registers.
template <int D, int kKeys, class T>
__device__ __forceinline__ void multiply_transposed(float (&result)[kKeys / 8][4], const RowFragments<D, T>& rows, const T* tile) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; n++) {
      uint32_t b[4];
      platform::load_matrix_x4(b, tile + tile_offset<D>(n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      platform::mma(result[2 * n], rows.part[k], b[0], b[1], T());
      platform::mma(result[2 * n + 1], rows.part[k], b[2], b[3], T());
    }
  }
}

// The same with the rows' fragments read when they are needed: for large D, where registers are short.
template <int D, int kKeys, class T>
__device__ __forceinline__ void multiply_transposed(float (&result)[kKeys / 8][4], const T* rows, int first_row, const T* tile) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t a[4];
    platform::load_matrix_x4(a, rows + tile_offset<D>(first_row + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < kKeys / 16; n++) {
      uint32_t b[4];
      platform::load_matrix_x4(b, tile + tile_offset<D>(n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      platform::mma(result[2 * n], a, b[0], b[1], T());
      platform::mma(result[2 * n + 1], a, b[2], b[3], T());
    }
  }
}

// result (16 x D) += weights (16 x kKeys) tile (kKeys x D), the weights rounded to T: a result fragment of one product, two
// columns of 8 at a time, is the left operand of the next.
template <int D, int kKeys, class T>
__device__ __forceinline__ void multiply(float (&result)[D / 8][4], const float (&weights)[kKeys / 8][4], const T* tile) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < kKeys / 16; k++) {
    const uint32_t a[4] = {
        platform::pack(weights[2 * k][0], weights[2 * k][1], T()), platform::pack(weights[2 * k][2], weights[2 * k][3], T()),
        platform::pack(weights[2 * k + 1][0], weights[2 * k + 1][1], T()),
        platform::pack(weights[2 * k + 1][2], weights[2 * k + 1][3], T())};
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      uint32_t b[4];
      platform::load_matrix_x4_transposed(b, tile + tile_offset<D>(k * 16 + lane % 16, 2 * n + lane / 16));
      platform::mma(result[2 * n], a, b[0], b[1], T());
      platform::mma(result[2 * n + 1], a, b[2], b[3], T());
    }
  }
}

// Writes this warp's 16 x D result, times a factor per row, to rows of a matrix in 16-byte stores. `staging`: the warp's own
// 16 rows of shared memory, not read by others.
template <int D, class T>
__device__ __forceinline__ void store_rows(T* matrix, int64_t stride, int first_row, int rows, const float (&result)[D / 8][4],
                                           const float (&factor)[2], T* staging) {
  const int lane = threadIdx.x % kWarpSize, row = lane / 4;
  __syncwarp();  // what was in the staging area has been read
#pragma unroll
  for (int i = 0; i < D / 8; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      T* target = staging + tile_offset<D>(row + 8 * half, i) + 2 * (lane % 4);
      *reinterpret_cast<uint32_t*>(target) =
          platform::pack(result[i][2 * half] * factor[half], result[i][2 * half + 1] * factor[half], T());
    }
  }
  __syncwarp();
  constexpr int kChunks = D / kChunkElements;
#pragma unroll
  for (int index = lane; index < kWarpRows * kChunks; index += kWarpSize) {
    const int r = index / kChunks, chunk = index % kChunks;
    if (first_row + r >= rows) continue;
    const uint4 word = *reinterpret_cast<const uint4*>(staging + tile_offset<D>(r, chunk));
    platform::store_16_bytes(matrix + (first_row + r) * stride + chunk * kChunkElements, word);
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

}  // namespace appo
