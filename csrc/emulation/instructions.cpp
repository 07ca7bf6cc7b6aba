// Warp instructions and asynchronous copies: what they compute, and what they cost in shared memory.
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda.h"
#include "sanitizers.h"

namespace emulation {
namespace {

constexpr int kWarp = 32;

struct Copy {
  unsigned char* destination;
  const unsigned char* source;
  int bytes;
};
struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};
std::vector<Copies> copies;  // of each thread of the block

void land(const Copy& copy) {
  std::memcpy(copy.destination, copy.source, copy.bytes);
  std::memset(copy.destination + copy.bytes, 0, 16 - copy.bytes);
}

float to_float(uint32_t pair, int half, Format format) {
  const uint16_t bits = static_cast<uint16_t>(half ? pair >> 16 : pair);
  if (format == Format::kBfloat16) {
    __nv_bfloat16 x;
    x.bits = bits;
    return static_cast<float>(x);
  }
  __half x;
  std::memcpy(&x.value, &bits, 2);
  return static_cast<float>(x);
}

struct ShuffleSlot {
  uint32_t value, result;
  int source;
};
struct MatrixSlot {
  uint32_t* registers;
  const void* row;
  uint16_t values[8];  // read by the lane itself, so that the sanitizers see who read
  int matrices;
  bool transposed;
};
struct MmaSlot {
  float* d;
  const uint32_t *a, *b;
  Format format;
};

void complete_shuffle(void* const* slots, uint32_t mask) {
  for (int lane = 0; lane < kWarp; lane++) {
    if (!(mask >> lane & 1)) continue;
    auto* slot = static_cast<ShuffleSlot*>(slots[lane]);
    if (!(mask >> slot->source & 1))
      fail("__shfl_sync: source lane %d is not in mask %08x", slot->source, mask);
    slot->result = static_cast<ShuffleSlot*>(slots[slot->source])->value;
  }
}

struct VoteSlot {
  bool vote;
  uint32_t result;
};
void complete_ballot(void* const* slots, uint32_t mask) {
  uint32_t result = 0;
  for (int lane = 0; lane < kWarp; lane++)
    if (mask >> lane & 1 && static_cast<VoteSlot*>(slots[lane])->vote) result |= 1u << lane;
  for (int lane = 0; lane < kWarp; lane++)
    if (mask >> lane & 1) static_cast<VoteSlot*>(slots[lane])->result = result;
}

// PTX ISA, "ldmatrix": lane l holds elements (l / 4, 2 (l % 4)) and the next of each 8 x 8 matrix.
void complete_ldmatrix(void* const* slots, uint32_t) {
  auto at = [&](int lane) { return static_cast<MatrixSlot*>(slots[lane]); };
  for (int matrix = 0; matrix < at(0)->matrices; matrix++) {
    const void* rows[8];
    for (int i = 0; i < 8; i++) rows[i] = at(matrix * 8 + i)->row;
    counters.bank_conflicts += phase_conflicts(rows, 8, 16);
    counters.shared_accesses++;
    for (int lane = 0; lane < kWarp; lane++) {
      const int row = lane / 4, column = 2 * (lane % 4);
      uint32_t low, high;
      if (at(lane)->transposed) {
        low = at(matrix * 8 + column)->values[row];
        high = at(matrix * 8 + column + 1)->values[row];
      } else {
        low = at(matrix * 8 + row)->values[column];
        high = at(matrix * 8 + row)->values[column + 1];
      }
      at(lane)->registers[matrix] = low | high << 16;
    }
  }
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": A is row-major, B column-major.
void complete_mma(void* const* slots, uint32_t) {
  alignas(32) float A[16][16], B[16][8], D[16][8];
  for (int lane = 0; lane < kWarp; lane++) {
    const auto& slot = *static_cast<MmaSlot*>(slots[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int h = 0; h < 2; h++) {
      A[group][pair + h] = to_float(slot.a[0], h, slot.format);
      A[group + 8][pair + h] = to_float(slot.a[1], h, slot.format);
      A[group][pair + 8 + h] = to_float(slot.a[2], h, slot.format);
      A[group + 8][pair + 8 + h] = to_float(slot.a[3], h, slot.format);
      B[pair + h][group] = to_float(slot.b[0], h, slot.format);
      B[pair + 8 + h][group] = to_float(slot.b[1], h, slot.format);
      D[group][pair + h] = slot.d[h];
      D[group + 8][pair + h] = slot.d[2 + h];
    }
  }
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) D[m][n] += A[m][k] * B[k][n];
  for (int lane = 0; lane < kWarp; lane++) {
    const auto& slot = *static_cast<MmaSlot*>(slots[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int h = 0; h < 2; h++) {
      slot.d[h] = D[group][pair + h];
      slot.d[2 + h] = D[group + 8][pair + h];
    }
  }
}

}  // namespace

uint32_t shuffle(uint32_t mask, uint32_t value, int source_lane) {
  ShuffleSlot slot{value, 0, source_lane};
  if (current->lane == 0) counters.shuffles++;
  warp_collective("__shfl_sync", mask, &slot, complete_shuffle);
  return slot.result;
}

uint32_t ballot(uint32_t mask, bool vote) {
  VoteSlot slot{vote, 0};
  warp_collective("vote", mask, &slot, complete_ballot);
  return slot.result;
}

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed) {
  MatrixSlot slot{registers, row, {}, matrices, transposed};
  if (current->lane == 0) counters.ldmatrix++;
  if (current->lane < 8 * matrices) {
    check_aligned(row, 16, "ldmatrix");
    declare_read(row, 16);
    const Unobserved scope;
    std::memcpy(slot.values, row, 16);
  }
  warp_collective("ldmatrix", 0xffffffffu, &slot, complete_ldmatrix);
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Format format) {
  MmaSlot slot{d, a, b, format};
  if (current->lane == 0) counters.mma++;
  warp_collective("mma.m16n8k16", 0xffffffffu, &slot, complete_mma);
}

void copy_async(void* destination, const void* source, int source_bytes) {
  check_aligned(destination, 16, "cp.async (shared)");
  check_aligned(source, 16, "cp.async (global)");
  if (source_bytes) declare_read(source, source_bytes);
  declare_write(destination, 16);  // it may be written from now on
  const Unobserved scope;
  counters.async_copies++;
  count_shared_access(destination, 16);
  Copy copy{static_cast<unsigned char*>(destination), static_cast<const unsigned char*>(source),
            source_bytes};
  // Until it is waited for, the copy may have landed or not. NaN stands for "not": a reader that is too early
  // is caught.
  if (random_schedule() && random_number() % 2) {
    land(copy);
  } else {
    std::memset(destination, 0xff, 16);
  }
  copies[current->index].open.push_back(copy);
}

void commit_copies() {
  const Unobserved scope;
  auto& mine = copies[current->index];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void wait_for_copies(int groups_left) {
  auto& groups = copies[current->index].groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) declare_write(copy.destination, 16);
    const Unobserved scope;
    for (const Copy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

size_t copies_in_flight() {
  const Unobserved scope;
  size_t count = copies[current->index].open.size();
  for (const auto& group : copies[current->index].groups) count += group.size();
  return count;
}

void forget_copies(int threads) { copies.assign(threads, {}); }

}  // namespace emulation
