// C interface of frame_attention: appo_frame_attention_forward.
#include "attention_launch.h"

APPO_EXPORT int appo_frame_attention_forward(const appo::AttentionForwardParams* params, size_t bytes,
                                             cudaStream_t stream) {
  if (bytes != sizeof *params) return cudaErrorInvalidValue;
  return APPO_FOR_HEAD_DIM(appo::forward_with_value, *params, stream);
}
