// C interface of frame_mass: appo_frame_mass_replay (from a given log-sum-exp), appo_frame_mass_one_pass
// (without one).
#include "frame_mass.cuh"

#include "attention_forward.cuh"
#include "attention_launch.h"

namespace appo {
namespace {

template <class T, int D>
cudaError_t replay(const FrameMassParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.rows, kRows) * ceil_div(p.frame_count, p.frames_per_block);
  const dim3 grid(static_cast<unsigned>(blocks), p.per_head ? p.query_heads : 1, p.batch);
  return platform::launch(&frame_mass_replay<T, D>, grid, dim3(kThreads), ReplayShape<D>::shared_bytes(),
                          stream, p);
}

}  // namespace
}  // namespace appo

APPO_EXPORT int appo_frame_mass_replay(const appo::FrameMassParams* params, size_t bytes,
                                       cudaStream_t stream) {
  if (bytes != sizeof *params || params->frames_per_block <= 0) return cudaErrorInvalidValue;
  return APPO_FOR_HEAD_DIM(appo::replay, *params, stream);
}

APPO_EXPORT int appo_frame_mass_one_pass(const appo::AttentionForwardParams* params, size_t bytes,
                                         cudaStream_t stream) {
  if (bytes != sizeof *params) return cudaErrorInvalidValue;
  return APPO_FOR_HEAD_DIM(appo::forward_without_value, *params, stream);
}
