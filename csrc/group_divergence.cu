// C interface of group_divergence_from_logits: appo_divergence_chunks.
#include "group_divergence.cuh"

#include "launch.h"

APPO_EXPORT int appo_divergence_chunks(const appo::DivergenceParams* params, size_t bytes,
                                       cudaStream_t stream) {
  using namespace appo;
  if (bytes != sizeof *params || params->chunks != ceil_div(params->vocabulary, kDivergenceChunk))
    return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(params->slot_count), static_cast<unsigned>(params->chunks)),
      block(kDivergenceThreads);
  constexpr size_t kShared = kDivergenceWarps * sizeof(float);
  switch (params->element) {
    case kFloat32: return platform::launch(&divergence_chunks<float>, grid, block, kShared, stream, *params);
    case kFloat16: return platform::launch(&divergence_chunks<__half>, grid, block, kShared, stream, *params);
    case kBfloat16:
      return platform::launch(&divergence_chunks<__nv_bfloat16>, grid, block, kShared, stream, *params);
    default: return cudaErrorInvalidValue;
  }
}
