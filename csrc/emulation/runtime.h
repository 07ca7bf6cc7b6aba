// The emulated GPU, as the stand-ins for CUDA's intrinsics see it.
//
// A launch runs block after block. The threads of a block are fibers that one OS thread switches between; a
// fiber runs until it reaches a barrier or a warp collective. Shared memory is filled with NaN before each
// block. A seed other than 0 draws a random schedule in which one warp runs far ahead of the others, and lets
// asynchronous copies land at random times: uniformly random lane orders miss most missing barriers, a warp
// that runs ahead does not.
//
// Misuse (deadlock, divergent collective, misaligned access, copies in flight at exit) ends the launch with a
// message.
#pragma once
#include <cstddef>
#include <cstdint>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

// CUDA's numbers for these errors.
constexpr int kInvalidConfiguration = 9;
constexpr int kLaunchFailure = 719;

struct Thread {
  dim3 thread, block, block_dim, grid_dim;
  int index, lane, warp;  // within the block; within the warp; of the block
};
extern Thread* current;

// Events since the last reset. A bank conflict is one extra cycle of shared memory.
struct Counters {
  uint64_t launches, blocks, barriers, shuffles, ldmatrix, mma, async_copies, shared_accesses, bank_conflicts;
};
extern Counters counters;

// Ends the launch from inside a kernel; the launcher gets an error whose text is the message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

using Kernel = void (*)(const void* params);
// kernel: its address, for the record of launches. call: runs it with the parameters, once per thread.
// Returns 0, or nonzero after a failure.
int launch(const void* kernel, Kernel call, const void* params, size_t params_bytes, dim3 grid, dim3 block,
           size_t shared_bytes);
const char* last_failure();

unsigned char* shared_memory();
void barrier();

// Lanes of `mask` meet; the last to arrive runs complete() over their slots. No memory ordering, as on the
// GPU.
void warp_collective(const char* name, uint32_t mask, void* slot,
                     void (*complete)(void* const* slots, uint32_t mask));
void syncwarp(uint32_t mask);
uint32_t shuffle(uint32_t mask, uint32_t value, int source_lane);
uint32_t ballot(uint32_t mask, bool vote);

enum class Format { kHalf, kBfloat16 };
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Format format);

void copy_async(void* destination, const void* source,
                int source_bytes);  // 16 bytes, zero-filled beyond source_bytes
void commit_copies();
void wait_for_copies(int groups_left);
size_t copies_in_flight();
void forget_copies(int threads);

bool random_schedule();
uint32_t random_number();

void check_aligned(const void* address, size_t bytes, const char* what);
// One lane's access to shared memory, for the count of bank conflicts. Not a collective: orders nothing.
void count_shared_access(const void* address, int bytes);
int phase_conflicts(const void* const* addresses, int lanes, int bytes);
void flush_shared_accesses(int warps);

}  // namespace emulation
