// Entry points of ThreadSanitizer and AddressSanitizer, as weak symbols: null unless the process runs under
// one of them.
//
// The runtime itself is never instrumented. It tells the sanitizers what the emulated hardware does, so that
// they see the threads of a block as threads, and only the synchronisation that CUDA guarantees.
#pragma once
#include <cstddef>

extern "C" {
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_destroy_fiber(void* fiber) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_acquire(void* tag) __attribute__((weak));
void __tsan_release(void* tag) __attribute__((weak));
void __tsan_read_range(void* address, unsigned long bytes) __attribute__((weak));
void __tsan_write_range(void* address, unsigned long bytes) __attribute__((weak));
void AnnotateIgnoreReadsBegin(const char* file, int line) __attribute__((weak));
void AnnotateIgnoreReadsEnd(const char* file, int line) __attribute__((weak));
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes)
    __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* bytes)
    __attribute__((weak));
void __asan_loadN(void* address, size_t bytes) __attribute__((weak));
void __asan_storeN(void* address, size_t bytes) __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void* address, size_t bytes) __attribute__((weak));
}

namespace emulation {

inline bool under_tsan() { return __tsan_acquire != nullptr; }

inline void acquire(void* tag) {
  if (__tsan_acquire) __tsan_acquire(tag);
}
inline void release(void* tag) {
  if (__tsan_release) __tsan_release(tag);
}
inline void declare_read(const void* address, size_t bytes) {
  if (__tsan_read_range) __tsan_read_range(const_cast<void*>(address), bytes);
  if (__asan_loadN) __asan_loadN(const_cast<void*>(address), bytes);
}
inline void declare_write(void* address, size_t bytes) {
  if (__tsan_write_range) __tsan_write_range(address, bytes);
  if (__asan_storeN) __asan_storeN(address, bytes);
}

// While one lives, TSan does not look: at the runtime's own bookkeeping, which all fibers share and one OS
// thread carries out. It sees memcpy, malloc and free even where the caller is not instrumented. No fiber may
// be switched meanwhile.
class Unobserved {
 public:
  Unobserved() {
    if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);  // and writes
  }
  ~Unobserved() {
    if (AnnotateIgnoreReadsEnd) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unobserved(const Unobserved&) = delete;
  Unobserved& operator=(const Unobserved&) = delete;
};

}  // namespace emulation
