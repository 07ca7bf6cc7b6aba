// The interface of ../platform.h on the emulated GPU.
#pragma once
#include "cuda.h"

#define APPO_SHARED_MEMORY(name) unsigned char* const name = emulation::shared_memory()

namespace platform {

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { emulation::ldmatrix(r, row, 4, false); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  emulation::ldmatrix(r, row, 4, true);
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  const uint32_t b[2] = {b0, b1};
  emulation::mma_m16n8k16(d, a, b, emulation::Format::kBfloat16);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  const uint32_t b[2] = {b0, b1};
  emulation::mma_m16n8k16(d, a, b, emulation::Format::kHalf);
}

inline void copy_async(void* shared, const void* global, bool present) {
  emulation::copy_async(shared, global, present ? 16 : 0);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kGroupsLeft>
void wait_for_copies() {
  emulation::wait_for_copies(kGroupsLeft);
}

inline float exp2(float x) { return ::exp2f(x); }

inline uint32_t pack(float low, float high, __nv_bfloat16) {
  return __nv_bfloat16(low).bits | static_cast<uint32_t>(__nv_bfloat16(high).bits) << 16;
}
inline uint32_t pack(float low, float high, __half) {
  const __half pair[2] = {__half(low), __half(high)};
  uint32_t word;
  std::memcpy(&word, pair, 4);
  return word;
}

inline int keep(int x) { return x; }

inline uint4 load_16_bytes(const void* global) {
  emulation::check_aligned(global, 16, "load of 16 bytes");
  return *static_cast<const uint4*>(global);
}
inline void store_16_bytes(void* global, uint4 value) {
  emulation::check_aligned(global, 16, "store of 16 bytes");
  *static_cast<uint4*>(global) = value;
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   const Params& params) {
  static thread_local void (*called)(Params);
  called = kernel;
  const auto call = [](const void* p) { called(*static_cast<const Params*>(p)); };
  return emulation::launch(reinterpret_cast<const void*>(kernel), call, &params, sizeof params, grid, block,
                           shared_bytes);
}

inline const char* error_text(cudaError_t) { return emulation::last_failure(); }

}  // namespace platform
