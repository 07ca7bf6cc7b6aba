// Reading and reducing rows of logits: 16-byte accesses where the row allows them, one block per row.
#pragma once
#include "dtypes.cuh"

namespace appo {

// Elements before the first 16-byte boundary of a row of `length` elements at `row`.
template <class T>
__device__ __forceinline__ int64_t unaligned_head(const T* row, int64_t length) {
  const int64_t head = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
  return min(head, length);
}

// Calls visit(values, index of the first, how many) for all elements, shared out to the threads of the block
// in a fixed order: vectors where the row is aligned, single elements before and after.
template <class T, class Visit>
__device__ __forceinline__ void for_each_vector(const T* row, int64_t length, Visit visit) {
  constexpr int kSize = Vector<T>::kSize;
  const int thread = threadIdx.x, threads = blockDim.x;
  const int64_t head = unaligned_head(row, length);
  const int64_t vectors = (length - head) / kSize;
  for (int64_t v = thread; v < vectors; v += threads) {
    Vector<T> values;
    values.bits = platform::load_16_bytes(row + head + v * kSize);
    visit(values, head + v * kSize, kSize);
  }
  const int64_t tail = head + vectors * kSize;
  // At most kSize - 1 elements on either side: the first threads take one each.
  if (thread < head) {
    Vector<T> values;
    values.element[0] = row[thread];
    visit(values, thread, 1);
  }
  if (tail + thread < length) {
    Vector<T> values;
    values.element[0] = row[tail + thread];
    visit(values, tail + thread, 1);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// The sum over the block, for all its threads. `scratch`: one float per warp of shared memory.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  float total = 0.f;
  for (unsigned warp = 0; warp < blockDim.x / kWarpSize; warp++) total += scratch[warp];
  return total;
}

}  // namespace appo
