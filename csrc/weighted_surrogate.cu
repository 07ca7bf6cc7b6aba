// C interface of logits_weighted_surrogate: appo_surrogate_rows (forward), appo_surrogate_gradient
// (backward).
#include "weighted_surrogate.cuh"

#include "launch.h"

namespace appo {
namespace {

// One block per row, whatever the vocabulary: a row of 152,064 is 74 vectors for each thread.
template <template <class> class Kernel>
cudaError_t per_row(const SurrogateParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.rows)), block(kSurrogateThreads);
  constexpr size_t kShared = kSurrogateWarps * 3 * sizeof(float);
  switch (params.element) {
    case kFloat32: return platform::launch(Kernel<float>::get(), grid, block, kShared, stream, params);
    case kFloat16: return platform::launch(Kernel<__half>::get(), grid, block, kShared, stream, params);
    case kBfloat16:
      return platform::launch(Kernel<__nv_bfloat16>::get(), grid, block, kShared, stream, params);
    default: return cudaErrorInvalidValue;
  }
}

template <class T>
struct Rows {
  static auto get() { return &surrogate_rows<T>; }
};
template <class T>
struct Gradient {
  static auto get() { return &surrogate_gradient<T>; }
};

}  // namespace
}  // namespace appo

APPO_EXPORT int appo_surrogate_rows(const appo::SurrogateParams* params, size_t bytes, cudaStream_t stream) {
  if (bytes != sizeof *params) return cudaErrorInvalidValue;
  return appo::per_row<appo::Rows>(*params, stream);
}

APPO_EXPORT int appo_surrogate_gradient(const appo::SurrogateParams* params, size_t bytes,
                                        cudaStream_t stream) {
  if (bytes != sizeof *params) return cudaErrorInvalidValue;
  return appo::per_row<appo::Gradient>(*params, stream);
}
