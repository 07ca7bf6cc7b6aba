// Blocks, threads, barriers and warp collectives.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <vector>

#include "fiber.h"
#include "record.h"
#include "runtime.h"
#include "sanitizers.h"

namespace emulation {

Thread* current;
Counters counters;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;  // what a block can have on sm_90
constexpr int kWarp = 32;
constexpr unsigned kPriorityChange = 256;  // steps between changes of one warp's priority, on average

enum class State { kReady, kAtBarrier, kInCollective, kFinished };

struct ThreadState : Thread {
  Fiber fiber;
  State state;
  const char* waiting_in;
};

struct WarpState {
  void* slots[kWarp];
  uint32_t arrived, mask;
  const char* collective;
  std::vector<int> ready;  // threads that can run
  uint32_t priority;       // in a random schedule, the highest runs
};

std::vector<ThreadState> threads;
std::vector<WarpState> warps;
size_t ready_count;
size_t next_warp;  // in the regular schedule
int alive, at_barrier;
unsigned char* shared_bytes_begin;
Kernel kernel_call;
const void* kernel_params;
char failure[512];
bool failed;
uint64_t seed, generator;
uint64_t last_blocks;  // of a grid; 0: all
// Addresses that stand for synchronisation events in TSan's eyes.
char launch_event, barrier_event, end_event;
std::mutex one_launch;

ThreadState& self() { return *static_cast<ThreadState*>(current); }

void make_ready(ThreadState& thread) {
  thread.state = State::kReady;
  warps[thread.warp].ready.push_back(thread.index);
  ready_count++;
}

void open_barrier() {
  at_barrier = 0;
  for (auto& thread : threads)
    if (thread.state == State::kAtBarrier) make_ready(thread);
}

void thread_main() {
  ThreadState& me = self();
  me.fiber.started();
  acquire(&launch_event);
  kernel_call(kernel_params);
  if (copies_in_flight()) fail("thread ended with asynchronous copies in flight");
  release(&end_event);
  me.state = State::kFinished;
  if (--alive && at_barrier == alive) open_barrier();  // threads that have returned are not waited for
  me.fiber.suspend(true);
  std::abort();
}

void describe_deadlock() {
  int length = std::snprintf(failure, sizeof failure, "deadlock (divergent barrier or warp collective):");
  const char* last = nullptr;
  for (auto& thread : threads) {
    if (thread.state == State::kFinished || thread.waiting_in == last) continue;
    last = thread.waiting_in;
    length += std::snprintf(failure + length, sizeof failure - length, " from thread %d on in %s;",
                            thread.index, last);
    if (length >= static_cast<int>(sizeof failure) - 64) break;
  }
  failed = true;
}

// The next thread to run: round robin over the warps, or, in a random schedule, of the warp with the highest
// priority.
ThreadState& choose() {
  size_t chosen = next_warp;
  if (seed) {
    if (random_number() % kPriorityChange == 0)
      warps[random_number() % warps.size()].priority = random_number();
    for (size_t i = 0; i < warps.size(); i++)
      if (!warps[i].ready.empty() &&
          (warps[chosen].ready.empty() || warps[i].priority > warps[chosen].priority))
        chosen = i;
    auto& ready = warps[chosen].ready;
    std::swap(ready.back(), ready[random_number() % ready.size()]);
  } else {
    while (warps[chosen].ready.empty()) chosen = (chosen + 1) % warps.size();
    next_warp = chosen;
  }
  ThreadState& thread = threads[warps[chosen].ready.back()];
  warps[chosen].ready.pop_back();
  ready_count--;
  return thread;
}

char* map_memory(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return static_cast<char*>(memory);
}

// Stacks and shared memory of one block. Under TSan both are fresh mappings, whose shadow is empty, for each
// block: blocks must not be ordered with one another, and memory that two of them use in turn would look like
// a race.
class Memory {
 public:
  Memory(size_t threads, size_t shared) : stack_bytes_(threads * kStackBytes), shared_bytes_(shared) {
    stacks_ = map_memory(stack_bytes_);
    renew_shared();
  }
  ~Memory() {
    munmap(stacks_, stack_bytes_);
    free_shared();
  }
  void next_block() {
    free_shared();
    if (under_tsan()) {
      munmap(stacks_, stack_bytes_);
      stacks_ = map_memory(stack_bytes_);
    }
    renew_shared();
  }
  char* stacks() const { return stacks_; }
  unsigned char* shared() const { return shared_; }

 private:
  void renew_shared() {
    if (!shared_bytes_) return;
    void* memory = nullptr;
    if (under_tsan()) {
      memory = map_memory(shared_bytes_);
    } else if (posix_memalign(&memory, 1024, shared_bytes_)) {  // the exact size: ASan guards its ends
      std::abort();
    }
    std::memset(memory, 0xff, shared_bytes_);  // NaN in every floating-point format
    shared_ = static_cast<unsigned char*>(memory);
  }
  void free_shared() {
    if (under_tsan() && shared_)
      munmap(shared_, shared_bytes_);
    else
      std::free(shared_);
  }

  size_t stack_bytes_, shared_bytes_;
  char* stacks_ = nullptr;
  unsigned char* shared_ = nullptr;
};

void run_block(dim3 block_index, dim3 grid, dim3 block, char* stacks) {
  const int count = static_cast<int>(threads.size());
  counters.blocks++;
  alive = count;
  at_barrier = 0;
  ready_count = next_warp = 0;
  forget_copies(count);
  for (auto& warp : warps) {
    warp = WarpState{};
    warp.priority = random_number();
  }
  for (int i = 0; i < count; i++) {
    ThreadState& thread = threads[i];
    thread.index = i;
    thread.lane = i % kWarp;
    thread.warp = i / kWarp;
    thread.block_dim = block;
    thread.grid_dim = grid;
    thread.block = block_index;
    thread.thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    thread.fiber.prepare(stacks + kStackBytes * i, kStackBytes, thread_main);
    make_ready(thread);
  }
  while (alive && !failed) {
    if (!ready_count) {
      describe_deadlock();
      break;
    }
    ThreadState& thread = choose();
    current = &thread;
    thread.fiber.resume();
    current = nullptr;
  }
  for (auto& thread : threads) thread.fiber.destroy();
  flush_shared_accesses(static_cast<int>(warps.size()));
}

}  // namespace

void fail(const char* format, ...) {
  char message[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  failed = true;
  if (!current) {
    std::snprintf(failure, sizeof failure, "%s", message);
    std::abort();  // only kernels may fail; this would be a fault of the runtime
  }
  const dim3 b = current->block;
  std::snprintf(failure, sizeof failure, "%s (block %u,%u,%u, thread %d)", message, b.x, b.y, b.z,
                current->index);
  self().fiber.suspend(false);  // for good: the scheduler ends the launch
  std::abort();
}

const char* last_failure() { return failure; }
unsigned char* shared_memory() { return shared_bytes_begin; }
bool random_schedule() { return seed != 0; }

uint32_t random_number() {
  generator ^= generator << 13;
  generator ^= generator >> 7;
  generator ^= generator << 17;
  return static_cast<uint32_t>(generator >> 32);
}

void set_last_blocks(uint64_t count) { last_blocks = count; }

void set_seed(uint64_t value) {
  seed = value;
  generator = 0x9E3779B97F4A7C15ull * (value + 1);
}

int launch(const void* kernel, Kernel call, const void* params, size_t params_bytes, dim3 grid, dim3 block,
           size_t shared_bytes) {
  std::lock_guard<std::mutex> lock(one_launch);
  counters.launches++;
  failed = false;
  if (!record_launch(kernel, params, params_bytes, grid, block, shared_bytes)) return 0;
  const size_t count = static_cast<size_t>(block.x) * block.y * block.z;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > kMaxSharedBytes) {
    std::snprintf(failure, sizeof failure,
                  "invalid launch: grid %u,%u,%u, block of %zu threads, %zu bytes shared", grid.x, grid.y,
                  grid.z, count, shared_bytes);
    return kInvalidConfiguration;
  }
  kernel_call = call;
  kernel_params = params;
  threads.clear();
  threads.resize(count);
  warps.assign((count + kWarp - 1) / kWarp, WarpState{});

  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order(last_blocks ? std::min(last_blocks, blocks) : blocks);
  std::iota(order.begin(), order.end(), blocks - order.size());
  if (seed)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);

  release(&launch_event);
  Memory memory(count, shared_bytes);
  for (size_t i = 0; i < order.size() && !failed; i++) {
    if (i) memory.next_block();
    shared_bytes_begin = memory.shared();
    const uint64_t b = order[i];
    run_block(dim3(b % grid.x, b / grid.x % grid.y, b / (static_cast<uint64_t>(grid.x) * grid.y)), grid,
              block, memory.stacks());
  }
  acquire(&end_event);
  return failed ? kLaunchFailure : 0;
}

void barrier() {
  counters.barriers++;
  release(&barrier_event);
  self().state = State::kAtBarrier;
  self().waiting_in = "__syncthreads";
  if (++at_barrier == alive) open_barrier();
  self().fiber.suspend(false);
  acquire(&barrier_event);
}

void warp_collective(const char* name, uint32_t mask, void* slot, void (*complete)(void* const*, uint32_t)) {
  ThreadState& me = self();
  WarpState& warp = warps[me.warp];
  if (!(mask >> me.lane & 1)) fail("%s: lane %d is not in its own mask %08x", name, me.lane, mask);
  if (!warp.arrived) {
    warp.mask = mask;
    warp.collective = name;
  } else if (warp.collective != name || warp.mask != mask) {
    fail("divergent warp collective: %s(%08x) while others are in %s(%08x)", name, mask, warp.collective,
         warp.mask);
  }
  warp.slots[me.lane] = slot;
  warp.arrived |= 1u << me.lane;
  if (warp.arrived != mask) {
    me.state = State::kInCollective;
    me.waiting_in = name;
    me.fiber.suspend(false);
    return;
  }
  complete(warp.slots, mask);
  warp.arrived = 0;
  for (int lane = 0; lane < kWarp; lane++)
    if (lane != me.lane && mask >> lane & 1) make_ready(threads[me.warp * kWarp + lane]);
  if (!seed) return;
  make_ready(me);
  me.fiber.suspend(false);
}

void syncwarp(uint32_t mask) {
  // One event per warp, found in memory that lives as long as the block.
  char* event = reinterpret_cast<char*>(&warps[self().warp].mask);
  release(event);
  warp_collective("__syncwarp", mask, nullptr, [](void* const*, uint32_t) {});
  acquire(event);
}

}  // namespace emulation
