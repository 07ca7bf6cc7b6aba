// logits_weighted_surrogate: one block per row of logits. The forward kernel reads a row once, for
// log-probability and entropy; the gradient kernel reads it once more and writes d loss / d logits, in place
// if asked.
//
//   z = logits / temperature,  lse = log sum exp z,  logp = z[target] - lse,  H = -sum p log p
//   d loss / d z_v = g (1[v = target] - p_v) - h p_v (log p_v + H),   g = d loss / d logp,  h = d loss / d H
#pragma once
#include "logit_rows.cuh"
#include "weighted_surrogate.h"

namespace appo {

constexpr int kSurrogateThreads = 256;
constexpr int kSurrogateWarps = kSurrogateThreads / kWarpSize;

// Running (max, sum exp(z - max), sum exp(z - max) (z - max)): all that log-probability and entropy need.
struct OnlineSoftmax {
  float row_max = -INFINITY, row_sum = 0.f, weighted_sum = 0.f;

  __device__ __forceinline__ void raise(float new_max) {
    if (new_max == row_max) return;
    if (row_sum > 0.f) {
      const float down = row_max - new_max, factor = platform::exp2(down * kLog2E);
      weighted_sum = factor > 0.f ? factor * (weighted_sum + row_sum * down) : 0.f;
      row_sum *= factor;
    }
    row_max = new_max;
  }
  // z must not exceed row_max. A logit of -inf has probability 0 and adds nothing.
  __device__ __forceinline__ void add(float z) {
    if (z == -INFINITY) return;
    const float d = z - row_max, p = platform::exp2(d * kLog2E);
    row_sum += p;
    weighted_sum += p * d;
  }
  __device__ __forceinline__ void merge(float other_max, float other_sum, float other_weighted_sum) {
    raise(fmaxf(row_max, other_max));
    if (other_sum == 0.f) return;  // but NaN goes on
    const float down = other_max - row_max, factor = platform::exp2(down * kLog2E);
    row_sum += other_sum * factor;
    if (factor > 0.f) weighted_sum += factor * (other_weighted_sum + other_sum * down);
  }
  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes; lanes /= 2) {
      const float other_max = __shfl_xor_sync(kAllLanes, row_max, lanes);
      const float other_sum = __shfl_xor_sync(kAllLanes, row_sum, lanes);
      const float other_weighted_sum = __shfl_xor_sync(kAllLanes, weighted_sum, lanes);
      merge(other_max, other_sum, other_weighted_sum);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kSurrogateThreads)
    surrogate_rows(const __grid_constant__ SurrogateParams p) {
  const int64_t row = blockIdx.x;
  if (p.mask[row] == 0.f) {
    if (threadIdx.x == 0) p.logprobs[row] = p.entropy[row] = p.row_max[row] = p.log_sum[row] = 0.f;
    return;
  }
  const T* logits = static_cast<const T*>(p.logits) + row / p.tokens * p.logits_stride_b +
                    row % p.tokens * p.logits_stride_t;

  OnlineSoftmax state;
  for_each_vector(logits, p.vocabulary, [&](const Vector<T>& values, int64_t, int count) {
    float z[Vector<T>::kSize], row_max = state.row_max;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; i++) {
      z[i] = i < count ? to_float(values.element[i]) * p.inverse_temperature : -INFINITY;
      row_max = fmaxf(row_max, z[i]);
    }
    state.raise(row_max);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; i++) state.add(z[i]);
  });
  state.merge_warp();

  APPO_SHARED_MEMORY(memory);
  auto* warp_states = reinterpret_cast<float*>(memory);  // (kSurrogateWarps, 3)
  if (threadIdx.x % kWarpSize == 0) {
    float* mine = warp_states + threadIdx.x / kWarpSize * 3;
    mine[0] = state.row_max, mine[1] = state.row_sum, mine[2] = state.weighted_sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kSurrogateWarps; warp++)
    state.merge(warp_states[warp * 3], warp_states[warp * 3 + 1], warp_states[warp * 3 + 2]);
  const float log_sum = logf(state.row_sum);
  p.row_max[row] = state.row_max;
  p.log_sum[row] = log_sum;
  p.logprobs[row] = to_float(logits[p.targets[row]]) * p.inverse_temperature - state.row_max - log_sum;
  p.entropy[row] = log_sum - state.weighted_sum / state.row_sum;
}

template <class T>
__global__ void __launch_bounds__(kSurrogateThreads)
    surrogate_gradient(const __grid_constant__ SurrogateParams p) {
  const int64_t row = blockIdx.x, b = row / p.tokens, t = row % p.tokens;
  T* gradient = static_cast<T*>(p.gradient) + b * p.gradient_stride_b + t * p.gradient_stride_t;
  const T* logits = static_cast<const T*>(p.logits) + b * p.logits_stride_b + t * p.logits_stride_t;
  const float g = p.slope[row], h = p.entropy_slope[row];
  const bool zero = p.mask[row] == 0.f || (g == 0.f && h == 0.f);
  if (zero) {
    for_each_vector(gradient, p.vocabulary, [&](const Vector<T>&, int64_t first, int count) {
      if (count == Vector<T>::kSize) {
        platform::store_16_bytes(gradient + first, Vector<T>().bits);
      } else {
        from_float(0.f, gradient[first]);
      }
    });
    return;
  }
  const float row_max = p.row_max[row], log_sum = p.log_sum[row], entropy = p.entropy[row],
              logp = p.logprobs[row];
  const int64_t target = p.targets[row];
  // 1 - p without cancellation where p is close to 1.
  const float at_target = -expm1f(logp) * g;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(gradient) - reinterpret_cast<uintptr_t>(logits)) % 16 == 0;

  for_each_vector(logits, p.vocabulary, [&](const Vector<T>& values, int64_t first, int count) {
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; i++) {
      if (i >= count) break;
      const float log_p = to_float(values.element[i]) * p.inverse_temperature - row_max - log_sum,
                  probability = platform::exp2(log_p * kLog2E);
      float dz = first + i == target ? at_target : -probability * g;
      if (h != 0.f && probability > 0.f) dz -= h * probability * (log_p + entropy);
      from_float(dz * p.inverse_temperature, result.element[i]);
    }
    if (count == Vector<T>::kSize && aligned) {
      platform::store_16_bytes(gradient + first, result.bits);
    } else {
#pragma unroll
      for (int i = 0; i < Vector<T>::kSize; i++)
        if (i < count) gradient[first + i] = result.element[i];
    }
  });
}

}  // namespace appo
