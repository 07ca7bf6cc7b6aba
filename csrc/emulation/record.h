// What was launched: lets tests run the compiled form of the same kernel with the same parameters, and ask
// for the counters.
#pragma once
#include "runtime.h"

namespace emulation {

void set_seed(uint64_t seed);          // 0: the regular schedule
void set_last_blocks(uint64_t count);  // of each grid only these are run; 0: all
// Keeps the launch when recording is on; returns whether it is to be run.
bool record_launch(const void* kernel, const void* params, size_t params_bytes, dim3 grid, dim3 block,
                   size_t shared_bytes);

}  // namespace emulation
