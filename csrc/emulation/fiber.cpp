#include "fiber.h"

#include "sanitizers.h"

#if defined(__x86_64__)
// swapcontext() makes two system calls for the signal mask; this makes none, and a launch switches millions
// of times.
extern "C" void appo_emulation_switch(void** save, void* to);
asm(R"(
.text
.globl appo_emulation_switch
.hidden appo_emulation_switch
.type appo_emulation_switch,@function
appo_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size appo_emulation_switch,.-appo_emulation_switch
)");
#endif

namespace emulation {
namespace {

// TSan: a switch of fibers is not an event that orders memory accesses.
constexpr unsigned kNoSynchronisation = 1;

#if defined(__x86_64__)
void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // What the first switch pops: six registers and the address of entry, which finds the stack as after a
  // call.
  auto** top = reinterpret_cast<void**>(stack + bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context = top;
}
void switch_context(Context& from, Context& to) { appo_emulation_switch(&from, to); }
#else
void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

}  // namespace

void Fiber::prepare(char* stack, size_t bytes, void (*entry)()) {
  stack_ = stack;
  stack_bytes_ = bytes;
  fake_stack_ = nullptr;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, bytes);
  make_context(own_, stack, bytes, entry);
  tsan_ = __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr;
}

void Fiber::resume() {
  if (__tsan_switch_to_fiber) {
    tsan_scheduler_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, kNoSynchronisation);
  }
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stack_, stack_bytes_);
  switch_context(scheduler_, own_);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
}

void Fiber::started() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
}

void Fiber::suspend(bool finished) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(tsan_scheduler_, kNoSynchronisation);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(finished ? nullptr : &fake_stack_, scheduler_stack_,
                                   scheduler_stack_bytes_);
  switch_context(own_, scheduler_);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
}

void Fiber::destroy() {
  if (tsan_) __tsan_destroy_fiber(tsan_);
  tsan_ = nullptr;
}

}  // namespace emulation
