// Alignment, and the bank conflicts of shared memory: 32 banks of 4 bytes; a warp's access is served in
// phases of 128 bytes.
#include <algorithm>
#include <array>
#include <deque>
#include <vector>

#include "runtime.h"

namespace emulation {
namespace {

constexpr int kWarp = 32, kBanks = 32;

// The accesses of the lanes of a warp are matched by their order: the n-th of each lane belongs to one
// instruction. That is exact while all lanes make the same accesses, and kernels in csrc/ do for those they
// declare.
struct Access {
  std::array<const void*, kWarp> address{};
  int lanes = 0, bytes = 0;
};
struct WarpLog {
  std::deque<Access> open;
  uint64_t first = 0;  // number of open.front()
  std::array<uint64_t, kWarp> next{};
};
std::vector<WarpLog> logs;

void account(const Access& access) {
  const int lanes_per_phase = 128 / access.bytes;
  counters.shared_accesses++;
  for (int lane = 0; lane < kWarp; lane += lanes_per_phase)
    counters.bank_conflicts +=
        phase_conflicts(access.address.data() + lane, std::min(lanes_per_phase, kWarp), access.bytes);
}

}  // namespace

void check_aligned(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("misaligned address in %s: %p, %zu bytes", what, address, bytes);
}

// Extra cycles of one phase: the most distinct words that any bank must deliver, less one.
int phase_conflicts(const void* const* addresses, int lanes, int bytes) {
  std::array<uintptr_t, kBanks> words;  // a phase is 128 bytes
  size_t count = 0;
  std::array<int, kBanks> load{};
  int most = 1;
  for (int lane = 0; lane < lanes; lane++) {
    if (!addresses[lane]) continue;
    const auto first = reinterpret_cast<uintptr_t>(addresses[lane]) / 4;
    for (int i = 0; i < std::max(bytes / 4, 1); i++) {
      const uintptr_t word = first + i;
      if (std::find(words.begin(), words.begin() + count, word) != words.begin() + count) continue;
      words[count++] = word;
      most = std::max(most, ++load[word % kBanks]);
    }
  }
  return most - 1;
}

void count_shared_access(const void* address, int bytes) {
  const size_t warp = current->warp;
  if (logs.size() <= warp) logs.resize(warp + 1);
  WarpLog& log = logs[warp];
  const uint64_t number = log.next[current->lane]++;
  while (log.first + log.open.size() <= number) log.open.emplace_back();
  Access& access = log.open[number - log.first];
  access.address[current->lane] = address;
  access.bytes = bytes;
  access.lanes++;
  while (!log.open.empty() && log.open.front().lanes == kWarp) {
    account(log.open.front());
    log.open.pop_front();
    log.first++;
  }
}

void flush_shared_accesses(int warps) {
  for (WarpLog& log : logs)
    for (const Access& access : log.open) account(access);
  logs.assign(warps, {});
}

}  // namespace emulation
