// Choosing the instance of an attention kernel, and launching the forward pass.
#pragma once
#include "attention_forward.cuh"
#include "head_dims.h"
#include "launch.h"

// Calls function<element type, head size>(params, stream).
#define APPO_FOR_ELEMENT(function, D, params, stream)                                 \
  ((params).element == appo::kFloat16    ? function<__half, D>(params, stream)        \
   : (params).element == appo::kBfloat16 ? function<__nv_bfloat16, D>(params, stream) \
                                         : cudaErrorInvalidValue)
#define APPO_IF_HEAD_DIM(D, function, params, stream) \
  (params).head_dim == D ? APPO_FOR_ELEMENT(function, D, params, stream):
#define APPO_FOR_HEAD_DIM(function, params, stream) \
  (APPO_HEAD_DIMS(APPO_IF_HEAD_DIM, function, params, stream) cudaErrorInvalidValue)

namespace appo {

template <class T, int D, bool kWithValue>
cudaError_t launch_forward(const AttentionForwardParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, kRows)), p.query_heads, p.batch);
  constexpr size_t kShared = ForwardShape<D>::template shared_bytes<kWithValue>();
  return platform::launch(&attention_forward<T, D, kWithValue>, grid, dim3(kThreads), kShared, stream, p);
}
template <class T, int D>
cudaError_t forward_with_value(const AttentionForwardParams& p, cudaStream_t stream) {
  return launch_forward<T, D, true>(p, stream);
}
template <class T, int D>
cudaError_t forward_without_value(const AttentionForwardParams& p, cudaStream_t stream) {
  return launch_forward<T, D, false>(p, stream);
}

}  // namespace appo
