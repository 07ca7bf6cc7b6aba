// The library as a whole: what it was built for, its constants that callers repeat, and the text of errors.
#include "attention_backward.h"
#include "attention_tiles.cuh"
#include "frame_ids.h"
#include "group_divergence.cuh"
#include "head_dims.h"
#include "launch.h"

#ifndef APPO_BUILT_FOR
#define APPO_BUILT_FOR "emulation"
#endif

// Architectures, separated by spaces: "sm_80 sm_90a compute_80", or "emulation".
APPO_EXPORT const char* appo_built_for() { return APPO_BUILT_FOR; }

namespace appo {
namespace {

struct Constant {
  const char* name;  // as in appo_kernels/cuda_constants.py; one that has several values stands several times
  double value;
};

#define APPO_CONSTANT(D, name) {name, D},
constexpr Constant kConstants[] = {
    {"FRAME_TILE", kFrameTile},
    {"KEY_TILE", kKeyTile},
    {"ROW_TILE", kRows},
    {"ROW_PADDING", kRowPadding},
    {"DIVERGENCE_CHUNK", kDivergenceChunk},
    {"DIVERGENCE_CLAMP", kClamp},
    {"ELEMENTS", kFloat32},
    {"ELEMENTS", kFloat16},
    {"ELEMENTS", kBfloat16},
    APPO_HEAD_DIMS(APPO_CONSTANT, "HEAD_DIMS") APPO_GRAD_HEAD_DIMS(APPO_CONSTANT, "GRAD_HEAD_DIMS")};
#undef APPO_CONSTANT

}  // namespace
}  // namespace appo

// The number of constants, with `constants` pointing at the first. Callers refuse the library where theirs differ.
APPO_EXPORT int appo_constants(const appo::Constant** constants) {
  *constants = appo::kConstants;
  return sizeof appo::kConstants / sizeof *appo::kConstants;
}

APPO_EXPORT const char* appo_error_text(int error) {
  return platform::error_text(static_cast<cudaError_t>(error));
}
