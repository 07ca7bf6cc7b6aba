// Constants, conversions between element types, and 16-byte groups of elements.
#pragma once
#include "platform.h"

namespace appo {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }
__device__ __forceinline__ void from_float(float x, __half& y) { y = __float2half(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16(x); }

// 16 bytes of elements.
template <class T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
  union {
    uint4 bits;
    T element[kSize];
  };
  __device__ Vector() : bits{} {}
};

}  // namespace appo
