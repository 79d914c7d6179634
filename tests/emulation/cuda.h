// As much of CUDA as the kernels use, for a CPU: emulation.cpp includes them after this.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct Extent { unsigned x; };
extern Extent gridDim, blockDim, blockIdx, threadIdx;

// One block runs at a time, so that a static variable is shared by just its threads. All of them
// lie in one section, which is filled with garbage before each block, as a GPU may find it.
#define __shared__ static __attribute__((section("emulated_shared")))

struct alignas(16) uint4 { unsigned x, y, z, w; };

// A kernel becomes a function of the address of its argument: what the driver below can call by
// name.
#define KERNEL(NAME, ARGUMENT)                                                                    \
    static void NAME##_body(const ARGUMENT &s);                                                   \
    extern "C" void NAME(const void *argument) { NAME##_body(*(const ARGUMENT *)argument); }      \
    static void NAME##_body(const ARGUMENT &s)

#define STREAMING_KERNEL KERNEL

#ifdef WITHOUT_BARRIERS  // for the test that a missing one is noticed
inline void __syncthreads() {}
#else
void __syncthreads();
#endif

// Return what the lane whose number differs in the bits of `apart` sent at the same time.
uint64_t exchange(uint32_t mask, uint64_t sent, int apart);

template <class T> T __shfl_xor_sync(uint32_t mask, T value, int apart) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, bits, apart);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Every lane sends its bit, and together they gather those of ever larger groups of lanes.
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    uint32_t bits = predicate ? 1u << threadIdx.x % 32 : 0u;
    for (int apart = 1; apart < 32; apart *= 2) bits |= __shfl_xor_sync(mask, bits, apart);
    return bits;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline uint32_t atomicMax(uint32_t *address, uint32_t value) {
    uint32_t old = *address;
    if (value > old) *address = value;
    return old;
}

inline uint32_t atomicAdd(uint32_t *address, uint32_t value) {
    uint32_t old = *address;
    *address = old + value;
    return old;
}

inline uint32_t atomicOr(uint32_t *address, uint32_t value) {
    uint32_t old = *address;
    *address = old | value;
    return old;
}
