// group_divergence_from_logits: a block takes one slot and one chunk of the vocabulary, and goes through the
// logits of the slot's members once. Each token is read twice by the same thread, the second time from L1:
// first for what the members have in common, then for how each differs from it. No term is a difference of
// sums: members that agree give exactly 0.
#pragma once
#include "group_divergence.h"
#include "logit_rows.cuh"

namespace appo {

constexpr int kDivergenceThreads = 256;
constexpr int kDivergenceWarps = kDivergenceThreads / kWarpSize;
constexpr float kClamp = 11.f;

// The rows of one slot's members, as log-probabilities.
template <class T>
struct Members {
  const DivergenceParams& p;
  int64_t slot;

  __device__ __forceinline__ int64_t position(int64_t member) const {
    return p.slots[slot * p.responses + member];
  }
  __device__ __forceinline__ const T* row(int64_t member, int64_t position) const {
    return static_cast<const T*>(p.logits) + member * p.logits_stride_g + position * p.logits_stride_n;
  }
  // visit(log-probabilities of token .. token + kTokens - 1) for each member; missing ones too if there is
  // a value that stands for them.
  template <int kTokens, class Visit>
  __device__ __forceinline__ void for_each(int64_t token, bool with_missing, Visit visit) const {
    for (int64_t member = 0; member < p.responses; member++) {
      const int64_t at = position(member);
      float log_p[kTokens];
      if (at >= 0) {
        Vector<T> values;
        if constexpr (kTokens == 1) {
          values.element[0] = row(member, at)[token];
        } else {
          values.bits = platform::load_16_bytes(row(member, at) + token);
        }
        const float lse = p.lse[member * p.positions + at];
#pragma unroll
        for (int i = 0; i < kTokens; i++) log_p[i] = to_float(values.element[i]) * p.inverse_temperature - lse;
      } else if (with_missing) {
#pragma unroll
        for (int i = 0; i < kTokens; i++) log_p[i] = p.log_uniform;
      } else {
        continue;
      }
      visit(log_p);
    }
  }
};

// sum over the tokens of sum_i p_i (log p_i - log pbar). With t the largest log p_i, d_i = log p_i - t:
// exp(t) (sum_i e^{d_i} d_i - sum_i e^{d_i} log mean_i e^{d_i}).
template <class T, int kTokens>
__device__ __forceinline__ float kl_terms(const Members<T>& members, int64_t token, float present) {
  float top[kTokens], sum[kTokens] = {}, weighted[kTokens] = {}, total = 0.f;
#pragma unroll
  for (int i = 0; i < kTokens; i++) top[i] = -INFINITY;
  members.template for_each<kTokens>(token, false, [&](const float (&log_p)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; i++) top[i] = fmaxf(top[i], log_p[i]);
  });
  members.template for_each<kTokens>(token, false, [&](const float (&log_p)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      if (log_p[i] == -INFINITY) continue;
      const float d = log_p[i] - top[i], ratio = platform::exp2(d * kLog2E);
      sum[i] += ratio;
      weighted[i] += ratio * d;
    }
  });
#pragma unroll
  for (int i = 0; i < kTokens; i++) {
    if (top[i] == -INFINITY) continue;  // no member can say the token
    total += platform::exp2(top[i] * kLog2E) * (weighted[i] - sum[i] * logf(sum[i] / present));
  }
  return total;
}

// sum over the tokens of sum_i (exp(d_i) - d_i - 1), d_i = clamp(mean_i log p_i - log p_i). Differences are
// taken from the first member's log p. log p = -inf is the limit of -x for a large x, the same for all
// members.
template <class T, int kTokens>
__device__ __forceinline__ float k3_terms(const Members<T>& members, int64_t token) {
  float first[kTokens], mean[kTokens] = {}, total = 0.f;
  int impossible[kTokens] = {}, seen = 0;
  members.template for_each<kTokens>(token, true, [&](const float (&log_p)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      if (seen == 0) first[i] = log_p[i];
      impossible[i] += log_p[i] == -INFINITY;
      mean[i] += log_p[i] - first[i];
    }
    seen++;
  });
  const float share = 1.f / static_cast<float>(members.p.responses);
  members.template for_each<kTokens>(token, true, [&](const float (&log_p)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      if (impossible[i] == members.p.responses) continue;
      float d = impossible[i] ? (log_p[i] == -INFINITY ? kClamp : -kClamp)
                              : mean[i] * share - (log_p[i] - first[i]);
      d = fminf(fmaxf(d, -kClamp), kClamp);
      total += expm1f(d) - d;
    }
  });
  return total;
}

template <class T, int kTokens>
__device__ __forceinline__ float chunk_terms(const Members<T>& members, int64_t begin, int64_t end,
                                             float present) {
  float total = 0.f;
  for (int64_t token = begin + threadIdx.x * kTokens; token < end; token += kDivergenceThreads * kTokens)
    total += members.p.k3 ? k3_terms<T, kTokens>(members, token) : kl_terms<T, kTokens>(members, token, present);
  return total;
}

// Four blocks on a multiprocessor: left alone, the compiler aims at six and spills registers for it.
template <class T>
__global__ void __launch_bounds__(kDivergenceThreads, 4)
    divergence_chunks(const __grid_constant__ DivergenceParams p) {
  APPO_SHARED_MEMORY(memory);
  constexpr int kSize = Vector<T>::kSize;
  const int64_t slot = blockIdx.x, chunk = blockIdx.y;
  const Members<T> members{p, slot};
  int present = 0;
  bool aligned = true;
  for (int64_t member = 0; member < p.responses; member++) {
    const int64_t at = members.position(member);
    if (at < 0) continue;
    present++;
    aligned = aligned && reinterpret_cast<uintptr_t>(members.row(member, at)) % 16 == 0;
  }
  const int64_t begin = chunk * kDivergenceChunk, end = min(begin + kDivergenceChunk, p.vocabulary);
  float total = 0.f, share = 0.f;
  if (p.k3 ? present > 0 : present > 1) {  // else all members agree: alone, or all uniform
    share = 1.f / static_cast<float>(p.k3 ? p.responses : present);
    const int64_t vectors_end = aligned ? begin + (end - begin) / kSize * kSize : begin;
    total = chunk_terms<T, kSize>(members, begin, vectors_end, static_cast<float>(present));
    total += chunk_terms<T, 1>(members, vectors_end, end, static_cast<float>(present));
  }
  total = block_sum(total, reinterpret_cast<float*>(memory));
  if (threadIdx.x == 0) p.partial[slot * p.chunks + chunk] = total * share;
}

}  // namespace appo
