// A fiber: a stack that runs until it suspends itself. One emulated CUDA thread is one fiber.
#pragma once
#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

#if defined(__x86_64__)
using Context = void*;  // a stack pointer; the callee-saved registers lie on that stack
#else
using Context = ucontext_t;
#endif

class Fiber {
 public:
  // Makes the next resume() call entry() on the given stack. entry must end in suspend(true) and never
  // return.
  void prepare(char* stack, size_t bytes, void (*entry)());
  void resume();                // scheduler -> fiber; returns when the fiber suspends
  void started();               // first thing entry() must call
  void suspend(bool finished);  // fiber -> scheduler; returns at the next resume(), never if finished
  void destroy();               // forgets the fiber, whether it has finished or not

 private:
  Context own_, scheduler_;
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* tsan_ = nullptr;
  void* tsan_scheduler_ = nullptr;
  void* fake_stack_ = nullptr;  // ASan's, of this fiber
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

}  // namespace emulation
