// The last step of a pass that leaves one mass per head: appo_head_mean.
#include "attention_forward.h"
#include "launch.h"

namespace appo {

constexpr int kHeadMeanThreads = 256;

// mass += frame weight x mean over heads, or without the mean. One thread an element, heads in order.
__global__ void __launch_bounds__(kHeadMeanThreads) head_mean(const __grid_constant__ HeadMeanParams p) {
  const int64_t elements = p.batch * p.kept_heads * p.rows * p.frame_count;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kHeadMeanThreads + threadIdx.x;
  if (element >= elements) return;
  const int64_t f = element % p.frame_count, r = element / p.frame_count % p.rows;
  const int64_t h = element / (p.frame_count * p.rows) % p.kept_heads,
                b = element / (p.frame_count * p.rows * p.kept_heads);
  const int64_t heads = p.query_heads / p.kept_heads;
  float total = 0.f;
  for (int64_t i = 0; i < heads; i++)
    total += p.per_head[((b * p.query_heads + h + i) * p.rows + r) * p.frame_count + f];
  total *= 1.f / static_cast<float>(heads);
  if (p.frame_weights) total *= p.frame_weights[b * p.frame_count + f];
  p.mass[b * p.mass_stride_b + h * p.mass_stride_h + r * p.mass_stride_r + f * p.mass_stride_f] += total;
}

}  // namespace appo

APPO_EXPORT int appo_head_mean(const appo::HeadMeanParams* params, size_t bytes, cudaStream_t stream) {
  using namespace appo;
  if (bytes != sizeof *params) return cudaErrorInvalidValue;
  const int64_t elements = params->batch * params->kept_heads * params->rows * params->frame_count;
  const dim3 grid(static_cast<unsigned>(ceil_div(elements, kHeadMeanThreads))), block(kHeadMeanThreads);
  return platform::launch(&head_mean, grid, block, 0, stream, *params);
}
