// What all CUDA sources share: how kernels are declared, and how their threads share work.
//
// To the bit what reference.py says in each folder, on every run and every GPU (Factored: close to
// rounding). Hence: compile with -fmad=false and IEEE division and roots (the defaults); no atomic
// additions of floats. Atomic maxima are of magnitudes, as unsigned integers (a NaN of either sign is
// then above all); their result does not depend on the order.
//
// Sizes are limited by nothing but memory: 64-bit indices, and every kernel strides over its work, so
// any grid is correct; blocks must have THREADS threads (a multiple of 32, at most 1024).
#pragma once

#include "runtime/arithmetic.h"

#ifndef KERNEL  // tests/emulation has its own
#define KERNEL(NAME, ARGUMENT) \
    extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) NAME(const ARGUMENT s)
// Few enough registers for so many threads on a multiprocessor, whose reads then hide latency.
#ifndef STREAMING_THREADS
#define STREAMING_THREADS 1024
#endif
#define STREAMING_KERNEL(NAME, ARGUMENT) \
    extern "C" __global__ void __launch_bounds__(THREADS, STREAMING_THREADS / THREADS) NAME(const ARGUMENT s)
#endif
#define FOR_EACH_TYPE(DEFINE) DEFINE(f32, float) DEFINE(bf16, bf16) DEFINE(f16, f16)

const u32 WHOLE_WARP = 0xffffffffu;

// "Flat" kernels: one thread an item.
FN i64 flat_start() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
FN i64 flat_stride() { return (i64)gridDim.x * blockDim.x; }

FN i64 end_of(i64 end) { return end; }
template <class T> FN i64 end_of(const T &part) { return part.end; }

// Return which of `count` parts, one after another, the item is in. A part is where it ends, or has an `end`.
template <class T> FN i64 part_with(i64 item, const T *parts, i64 count) {
    i64 low = 0, high = count - 1;
    while (low < high) {
        i64 middle = (low + high) / 2;
        if (end_of(parts[middle]) <= item) low = middle + 1;
        else high = middle;
    }
    return low;
}

// A block of work: number `block` of the batch's step of number `step`.
struct Work { i64 step, block; };

FN i64 num_blocks(const Batch &b) { return b.ends[b.count - 1]; }

FN Work work_of(const Batch &b, i64 index) {
    const i64 step = part_with(index, b.ends, b.count);
    Work work = {step, index - (step ? b.ends[step - 1] : 0)};
    return work;
}

// The maximum over `lanes` neighbouring threads, a power of two up to 32. All of
// them must come here together.
FN u32 max_over_lanes(u32 x, int lanes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if (lanes == 32) return __reduce_max_sync(WHOLE_WARP, x);
#endif
    for (int apart = lanes / 2; apart > 0; apart /= 2)
        x = larger_bits(x, __shfl_xor_sync(WHOLE_WARP, x, apart));
    return x;
}

FN bool is_first_of_key(const i64 *sorted, i64 i) { return i == 0 || sorted[i - 1] != sorted[i]; }
