// What every launcher shares: the C interface's conventions.
//
// A launcher takes a pointer to its operator's params struct, the size that the caller believes it has, and a
// stream. It returns a CUDA error number, 0 for success; appo_error_text() tells what it means.
#pragma once
#include <stddef.h>

#include "platform.h"

#define APPO_EXPORT extern "C" __attribute__((visibility("default")))

namespace appo {

// Element types of tensors, as the callers number them.
enum Element : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace appo
