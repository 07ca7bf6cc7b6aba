// Stand-ins for the part of CUDA C++ that csrc/ uses, when it is compiled as plain C++ for the CPU.
// Names and behaviour follow the CUDA programming guide; anything not here must not be used by a kernel.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t cudaErrorLaunchFailure = emulation::kLaunchFailure;

// 16-bit floats: storage, and conversion with round to nearest even.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const bool nan = (word & 0x7fffffff) > 0x7f800000;
    bits = nan ? 0x7fff : static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};
struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float x) : value(static_cast<_Float16>(x)) {}
  explicit operator float() const { return static_cast<float>(value); }
};
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __half __float2half(float x) { return __half(x); }

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block)
#define blockDim (emulation::current->block_dim)
#define gridDim (emulation::current->grid_dim)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulation::syncwarp(mask); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source_lane) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit values");
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word = emulation::shuffle(mask, word, source_lane & 31);
  std::memcpy(&value, &word, 4);
  return value;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return __shfl_sync(mask, value, emulation::current->lane ^ lanes);
}
inline int __any_sync(uint32_t mask, int vote) { return emulation::ballot(mask, vote) != 0; }
inline int __all_sync(uint32_t mask, int vote) { return emulation::ballot(mask, vote) == mask; }

using std::max;
using std::min;
