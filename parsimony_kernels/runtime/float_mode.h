// The mode in which a thread calculates: whether numbers close to 0 become 0, and how it rounds.
//
// A thread has its own. torch.set_flush_denormal changes the calling thread's, and OpenMP's other threads
// may be older than that. So that no result depends on the number of threads, a parallel region begins with
//     const InMode mode(the caller's current_mode());
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

typedef unsigned long long ModeBits;

#if defined(__SSE2__)
const ModeBits EXCEPTIONS_SEEN = 0x3f;  // no mode, and not to be lost

inline ModeBits current_mode() { return _mm_getcsr() & ~EXCEPTIONS_SEEN; }

inline void set_mode(ModeBits mode) {
    _mm_setcsr((unsigned)mode | (_mm_getcsr() & EXCEPTIONS_SEEN));
    __asm__ volatile("" : : : "memory");  // what is read from memory is not used before
}
#elif defined(__aarch64__)
inline ModeBits current_mode() {
    ModeBits mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}

inline void set_mode(ModeBits mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else  // torch cannot change it there
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
