// What the attention kernels share: tiles in shared memory, their fragments, and the products of tiles.
//
// A block has 4 warps and 64 query rows, 16 to a warp. In the fragment of an mma, lane l holds of each 16 x 8
// result the elements (l / 4, 2 (l % 4)), the next column, and the same columns 8 rows below: a lane has two
// rows, and the four lanes of a quad share them.
#pragma once
#include "dtypes.cuh"

namespace appo {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 64;                  // query rows of a block
constexpr int kKeyTile = 64;               // keys of a block's largest tile
constexpr int kWarpRows = kRows / kWarps;  // 16: the rows of one mma
constexpr int kChunkElements = 8;          // 16 bytes of 16-bit elements

// A tile of rows of D elements in shared memory. The 16-byte chunks of a row are permuted so that the 8 rows
// of one matrix of ldmatrix lie in 8 different groups of 4 banks: the row's low bits that its pitch does not
// already spread over the banks are folded into the chunk's lowest kBits.
template <int D>
struct TileLayout {
  static constexpr int kChunks = D / kChunkElements;
  static constexpr int kBits = kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : kChunks % 2 == 0 ? 1 : 0;
  static_assert(kBits > 0, "a row must be a multiple of 32 bytes");
  static constexpr int kLow = (1 << kBits) - 1;

  static __device__ __forceinline__ int fold(int row) { return row >> (3 - kBits) & kLow; }
  // In elements.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * D + (chunk ^ fold(row)) * kChunkElements;
  }
};

// Where a lane finds its rows of the matrices of ldmatrix: row `row` + 16 n, chunk `chunk` + 2 k, of which n
// and k are constants in unrolled loops. What depends on the lane is found once, for each of the few k whose
// permutations differ; the rest is the instruction's immediate offset.
template <int D>
struct LaneView {
  static constexpr int kDifferent = 1 << (TileLayout<D>::kBits - 1);
  int lane_bytes[kDifferent];

  __device__ __forceinline__ LaneView(int row, int chunk) {
#pragma unroll
    for (int k = 0; k < kDifferent; k++)
      lane_bytes[k] = platform::keep(TileLayout<D>::offset(row, chunk + 2 * k) * 2);
  }
  template <class T>
  __device__ __forceinline__ const void* at(const T* tile, int n, int k) const {
    const auto* lane = reinterpret_cast<const unsigned char*>(tile) + lane_bytes[k % kDifferent];
    return lane + (16 * n * D + k / kDifferent * kDifferent * 2 * kChunkElements) * sizeof(T);
  }
};

// Views of a tile for ldmatrix: 16 rows as the left operand of mma, or, transposed, 16 rows that the product
// sums over as two right operands (the same lanes); and 16 rows, which are columns of the product, as two
// right operands.
template <int D>
struct LeftView : LaneView<D> {
  __device__ __forceinline__ LeftView() : LaneView<D>(threadIdx.x % 16, threadIdx.x % kWarpSize / 16) {}
};
template <int D>
struct RightView : LaneView<D> {
  __device__ __forceinline__ RightView()
      : LaneView<D>(threadIdx.x % 8 + threadIdx.x % kWarpSize / 16 * 8, threadIdx.x % 16 / 8) {}
};

// Starts copying rows first .. first + kTileRows - 1 of a matrix of `rows` rows; those beyond it become
// zeros.
template <int D, int kTileRows, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* matrix, int64_t stride, int first, int rows) {
  constexpr int kChunks = D / kChunkElements;
  static_assert(kTileRows * kChunks % kThreads == 0, "every thread copies the same number of chunks");
  constexpr int kCopies = kTileRows * kChunks / kThreads;
  if constexpr (kThreads % kChunks == 0) {  // a thread's chunks are below one another: one address and a step
    constexpr int kStep = kThreads / kChunks;
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks, left = rows - first - row;
    const T* source = matrix + chunk * kChunkElements + static_cast<unsigned>(first + row) * stride;
#pragma unroll
    for (int i = 0; i < kCopies; i++, source += kStep * stride)
      platform::copy_async(tile + TileLayout<D>::offset(row + i * kStep, chunk), source, i * kStep < left);
  } else {
#pragma unroll
    for (int i = 0; i < kCopies; i++) {
      const int index = i * kThreads + threadIdx.x, row = index / kChunks, chunk = index % kChunks;
      const T* source = matrix + chunk * kChunkElements + static_cast<unsigned>(first + row) * stride;
      platform::copy_async(tile + TileLayout<D>::offset(row, chunk), source, first + row < rows);
    }
  }
}

// The fragments of this warp's 16 rows of a tile, as the left operand of a product over D.
template <int D, class T>
struct RowFragments {
  uint32_t part[D / 16][4];
  __device__ __forceinline__ void load(const T* rows, const LeftView<D>& view) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      uint32_t a[4];
      platform::load_matrix_x4(a, view.at(rows, 0, k));
#pragma unroll
      for (int i = 0; i < 4; i++) part[k][i] = a[i];  // each by its index, which the emulation checks
    }
  }
};

// result (16 x kKeys) += rows (16 x D) tile (kKeys x D)^T; the rows' fragments come from registers.
template <int D, int kKeys, class T>
__device__ __forceinline__ void multiply_transposed(float (&result)[kKeys / 8][4],
                                                    const RowFragments<D, T>& rows, const T* tile,
                                                    const RightView<D>& view) {
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; n++) {
      uint32_t b[4];
      platform::load_matrix_x4(b, view.at(tile, n, k));
      platform::mma(result[2 * n], rows.part[k], b[0], b[1], T());
      platform::mma(result[2 * n + 1], rows.part[k], b[2], b[3], T());
    }
  }
}

// The same with the rows' fragments read when they are needed: for large D, where registers are short.
template <int D, int kKeys, class T>
__device__ __forceinline__ void multiply_transposed(float (&result)[kKeys / 8][4], const T* rows,
                                                    const LeftView<D>& row_view, const T* tile,
                                                    const RightView<D>& view) {
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t a[4];
    platform::load_matrix_x4(a, row_view.at(rows, 0, k));
#pragma unroll
    for (int n = 0; n < kKeys / 16; n++) {
      uint32_t b[4];
      platform::load_matrix_x4(b, view.at(tile, n, k));
      platform::mma(result[2 * n], a, b[0], b[1], T());
      platform::mma(result[2 * n + 1], a, b[2], b[3], T());
    }
  }
}

// result (16 x D) += weights (16 x kKeys) tile (kKeys x D), the weights rounded to T: a result fragment of
// one product, two columns of 8 at a time, is the left operand of the next.
template <int D, int kKeys, class T>
__device__ __forceinline__ void multiply(float (&result)[D / 8][4], const float (&weights)[kKeys / 8][4],
                                         const T* tile, const LeftView<D>& view) {
#pragma unroll
  for (int k = 0; k < kKeys / 16; k++) {
    const uint32_t a[4] = {platform::pack(weights[2 * k][0], weights[2 * k][1], T()),
                           platform::pack(weights[2 * k][2], weights[2 * k][3], T()),
                           platform::pack(weights[2 * k + 1][0], weights[2 * k + 1][1], T()),
                           platform::pack(weights[2 * k + 1][2], weights[2 * k + 1][3], T())};
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      uint32_t b[4];
      platform::load_matrix_x4_transposed(b, view.at(tile, k, n));
      platform::mma(result[2 * n], a, b[0], b[1], T());
      platform::mma(result[2 * n + 1], a, b[2], b[3], T());
    }
  }
}

// Writes this warp's 16 x D result, times a factor per row, to rows of a matrix in 16-byte stores. `staging`:
// the warp's own 16 rows of shared memory, not read by others.
template <int D, class T>
__device__ __forceinline__ void store_rows(T* matrix, int64_t stride, int first_row, int rows,
                                           const float (&result)[D / 8][4], const float (&factor)[2],
                                           T* staging) {
  const int lane = threadIdx.x % kWarpSize, row = lane / 4;
  __syncwarp();  // what was in the staging area has been read
#pragma unroll
  for (int i = 0; i < D / 8; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      T* target = staging + TileLayout<D>::offset(row + 8 * half, i) + 2 * (lane % 4);
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
    const uint4 word = *reinterpret_cast<const uint4*>(staging + TileLayout<D>::offset(r, chunk));
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
