// The runtime's C interface for the tests: seed, counters, record of launches.
#include "record.h"

#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

namespace emulation {
namespace {

struct Launch {
  std::string kernel;  // mangled, as nvcc names it too
  std::vector<unsigned char> params;
  dim3 grid, block;
  size_t shared_bytes;
};

enum Recording { kOff, kRecordAndRun, kRecordOnly };
Recording recording = kOff;
std::vector<Launch> launches;

}  // namespace

bool record_launch(const void* kernel, const void* params, size_t params_bytes, dim3 grid, dim3 block,
                   size_t shared_bytes) {
  if (recording == kOff) return true;
  Dl_info info{};
  const bool named = dladdr(kernel, &info) && info.dli_sname && info.dli_saddr == kernel;
  const auto* bytes = static_cast<const unsigned char*>(params);
  launches.push_back(
      {named ? info.dli_sname : "?", {bytes, bytes + params_bytes}, grid, block, shared_bytes});
  return recording == kRecordAndRun;
}

}  // namespace emulation

extern "C" {

void appo_emulation_seed(uint64_t seed) { emulation::set_seed(seed); }

// Only the last blocks of each grid are run: those with the largest indices. 0: all.
void appo_emulation_last_blocks(uint64_t count) { emulation::set_last_blocks(count); }

// 0: off; 1: record and run; 2: record only. Forgets earlier launches.
void appo_emulation_record(int mode) {
  emulation::recording = static_cast<emulation::Recording>(mode);
  emulation::launches.clear();
}

int appo_emulation_launches() { return static_cast<int>(emulation::launches.size()); }

// geometry: grid x, y, z, block x, y, z, bytes of shared memory, bytes of parameters.
void appo_emulation_launch(int index, const char** kernel, const unsigned char** params, uint64_t* geometry) {
  const auto& launch = emulation::launches.at(index);
  *kernel = launch.kernel.c_str();
  *params = launch.params.data();
  const uint64_t values[] = {launch.grid.x,  launch.grid.y,  launch.grid.z,       launch.block.x,
                             launch.block.y, launch.block.z, launch.shared_bytes, launch.params.size()};
  std::memcpy(geometry, values, sizeof values);
}

// Copies the counters (in the order of runtime.h) and sets them to zero.
void appo_emulation_counters(uint64_t* values) {
  std::memcpy(values, &emulation::counters, sizeof emulation::counters);
  emulation::counters = {};
}
}
