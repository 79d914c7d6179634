// The mode in which a thread calculates: whether denormal numbers become 0, and how it rounds.
//
// Each thread has its own mode. torch.set_flush_denormal changes only that of the calling thread, and
// OpenMP's other threads may have been started before. So that no result depends on the number of threads,
// every parallel region begins with
//     const InMode mode(the caller's current_mode());
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

typedef unsigned long long ModeBits;

#if defined(__SSE2__)
const ModeBits EXCEPTIONS_SEEN = 0x3f;  // flags that are no part of the mode, and are kept

inline ModeBits current_mode() { return _mm_getcsr() & ~EXCEPTIONS_SEEN; }

inline void set_mode(ModeBits mode) {
    _mm_setcsr((unsigned)mode | (_mm_getcsr() & EXCEPTIONS_SEEN));
    __asm__ volatile("" : : : "memory");  // no read from memory is moved before this
}
#elif defined(__aarch64__)
inline ModeBits current_mode() {
    ModeBits mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}

inline void set_mode(ModeBits mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else  // torch cannot change the mode there
inline ModeBits current_mode() { return 0; }

inline void set_mode(ModeBits) {}
#endif

// Until the end of the scope this thread calculates in the mode; then in its own again.
class InMode {
  public:
    explicit InMode(ModeBits mode) : own(current_mode()), is_changed(mode != own) {
        if (is_changed) set_mode(mode);
    }
    InMode(const InMode &) = delete;
    ~InMode() {
        if (is_changed) set_mode(own);
    }

  private:
    const ModeBits own;
    const bool is_changed;
};

}  // namespace
