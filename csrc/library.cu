// The library as a whole: what it was built for, and the text of errors.
#include "launch.h"

#ifndef APPO_BUILT_FOR
#define APPO_BUILT_FOR "emulation"
#endif

// Architectures, separated by spaces: "sm_80 sm_90a compute_80", or "emulation".
APPO_EXPORT const char* appo_built_for() { return APPO_BUILT_FOR; }

APPO_EXPORT const char* appo_error_text(int error) {
  return platform::error_text(static_cast<cudaError_t>(error));
}
