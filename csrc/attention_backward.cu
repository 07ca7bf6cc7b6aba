// C interface of the backward of frame_attention and frame_mass: appo_attention_backward.
#include "attention_backward_keys.cuh"
#include "attention_backward_rows.cuh"
#include "head_dims.h"
#include "launch.h"

namespace appo {
namespace {

template <class T, int D, bool kWithValue>
cudaError_t backward(const AttentionBackwardParams& p, cudaStream_t stream) {
  using Shape = BackwardShape<D>;
  const dim3 row_grid(static_cast<unsigned>(ceil_div(p.rows, kRows)), p.query_heads, p.batch);
  const cudaError_t error =
      platform::launch(&attention_backward_rows<T, D, kWithValue>, row_grid, dim3(kThreads),
                       Shape::template rows_shared_bytes<kWithValue>(), stream, p);
  if (error != cudaSuccess || !(p.grad_key || p.grad_value)) return error;
  const dim3 key_grid(static_cast<unsigned>(ceil_div(p.keys, Shape::kKeys)), p.key_heads, p.batch);
  return platform::launch(&attention_backward_keys<T, D, kWithValue>, key_grid, dim3(kThreads),
                          Shape::template keys_shared_bytes<kWithValue>(), stream, p);
}

template <class T, int D>
cudaError_t backward(const AttentionBackwardParams& p, cudaStream_t stream) {
  return p.value ? backward<T, D, true>(p, stream) : backward<T, D, false>(p, stream);
}

template <class T>
cudaError_t backward(const AttentionBackwardParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
#define APPO_CASE(D, ...) \
  case D: return backward<T, D>(p, stream);
    APPO_GRAD_HEAD_DIMS(APPO_CASE)
#undef APPO_CASE
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace appo

APPO_EXPORT int appo_attention_backward(const appo::AttentionBackwardParams* params, size_t bytes,
                                        cudaStream_t stream) {
  if (bytes != sizeof *params) return cudaErrorInvalidValue;
  switch (params->element) {
    case appo::kFloat16: return appo::backward<__half>(*params, stream);
    case appo::kBfloat16: return appo::backward<__nv_bfloat16>(*params, stream);
    default: return cudaErrorInvalidValue;
  }
}
