// The passes of buffers.py for CPU tensors, on the same terms as host.cpp, with which it is compiled.
//
// A tensor is walked in blocks of 256 elements, those that share a scale in 8-bit storage. A block passes
// through arrays that stay in the first-level cache: what it is stored as, before and after, is chosen for
// a block and not for an element, so that each way is one small loop and needs no product of all ways.
#include <cmath>
#include <cstddef>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "runtime/arithmetic.h"
#include "runtime/float_mode.h"

namespace {

// ---- what buffers.py hands over; host_buffers.py mirrors these ----------------------------------------

enum Kind { ABSENT, FLOAT32, BFLOAT16, INT8 };

struct BufferArgs {
    void *values;
    float *scales;  // of INT8
    i64 kind;
};

struct Correction {  // mirrors operands.Correction
    float u_decay, u_gain, v_from_u, v_gain;
};

struct AccumulateArgs {
    const void *grad;
    const float *scale;  // null: 1
    BufferArgs residual, old_residual, velocity, old_velocity;
    i64 n, residual_key, velocity_key;
    int *report;         // largest, count, and with a selection BINS more; 0 before
    i64 *indices;        // what is taken out, `capacity` places for each of the threads; null: nothing is
    float *values, *velocities;  // velocities null: they stay
    i64 capacity;
    int sample_every, sample_first, dtype, threads;
    float threshold;
    Correction correction;
};

const int BLOCK = 256;
const float LEVELS = 127.0f, MIN_SCALE = 1e-30f;
const int BIN_SHIFT = 20, BINS = 1 << (31 - BIN_SHIFT);
const i64 AHEAD = 2 * BLOCK;      // elements
const i64 STREAM_FROM = 1 << 20;  // elements; smaller buffers may still be in a cache when read again
const float zeros[BLOCK] = {};

struct Span {  // a block's elements
    i64 begin;
    int length;
    Span(i64 block, i64 n)
        : begin(block * BLOCK), length(n - begin < BLOCK ? (int)(n - begin) : BLOCK) {}
};

inline i64 blocks_of(i64 n) { return (n + BLOCK - 1) / BLOCK; }
inline int magnitude_bits(float x) { return (int)(as_bits(x) & 0x7fffffffu); }
inline int max_of(int a, int b) { return a > b ? a : b; }

int largest_bits(const float *x, int length) {
    int largest = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < length; j++) largest = max_of(largest, magnitude_bits(x[j]));
    return largest;
}

// ---- between storage and float32: one block -----------------------------------------------------------

template <class T> void widen_all(const T *x, int length, float *out) {
#pragma omp simd
    for (int j = 0; j < length; j++) out[j] = widen(x[j]);
}

// The block's values: where they lie if they are float32, else in `room`.
const float *decode(const BufferArgs &b, Span s, float *room) {
    if (b.kind == ABSENT) return zeros;
    if (b.kind == FLOAT32) return (const float *)b.values + s.begin;
    if (b.kind == BFLOAT16) {
        widen_all((const bf16 *)b.values + s.begin, s.length, room);
        return room;
    }
    const signed char *codes = (const signed char *)b.values + s.begin;
    const float scale = b.scales[s.begin / BLOCK];
#pragma omp simd
    for (int j = 0; j < s.length; j++) room[j] = (float)codes[j] * scale;
    return room;
}

// Past the caches: before a buffer of this size is read again, they will have been filled with others.
void stream(const float *x, int length, float *out) {
    int j = 0;
#if defined(__SSE2__)
    for (; j < length && (size_t)(out + j) % 16; j++) out[j] = x[j];
    for (; j + 4 <= length; j += 4) _mm_stream_ps(out + j, _mm_loadu_ps(x + j));
#endif
    for (; j < length; j++) out[j] = x[j];
}

// Store a block, with zeros at some places. A scale is that of the block without these zeros.
void store(const BufferArgs &b, Span s, float *x, i64 key, const int *places, int num_places, bool is_streamed) {
    const int largest = b.kind == INT8 ? largest_bits(x, s.length) : 0;
    const u32 random = folded(key), first = (u32)s.begin;
    for (int i = 0; i < num_places; i++) x[places[i]] = 0.0f;
    if (b.kind == FLOAT32) {
        float *out = (float *)b.values + s.begin;
        if (is_streamed) return stream(x, s.length, out);
#pragma omp simd
        for (int j = 0; j < s.length; j++) out[j] = x[j];
    }
    if (b.kind == BFLOAT16) {
        bf16 *out = (bf16 *)b.values + s.begin;
#pragma omp simd
        for (int j = 0; j < s.length; j++) out[j] = stochastic_bf16(x[j], random_bits(first + (u32)j, random));
    }
    if (b.kind == INT8) {
        signed char *codes = (signed char *)b.values + s.begin;
        float scale = as_float((u32)largest) / LEVELS;
        scale = scale < MIN_SCALE ? MIN_SCALE : scale;
        b.scales[s.begin / BLOCK] = scale;
#pragma omp simd
        for (int j = 0; j < s.length; j++)
            codes[j] = stochastic_code(x[j], scale, random_bits(first + (u32)j, random));
    }
}

// ---- accumulate ---------------------------------------------------------------------------------------

// x = scale * grad, of a block; returns the largest |x|, as bits.
template <class T> int scaled(const T *grad, float scale, int length, float *x) {
    int largest = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < length; j++) {
        x[j] = widen(grad[j]) * scale;
        largest = max_of(largest, magnitude_bits(x[j]));
    }
    return largest;
}

// Ask for a later block: while one is hashed, nothing else would be on its way from memory.
inline void fetch(const void *values, i64 begin, int bytes_each) {
    const char *from = (const char *)values + (begin + AHEAD) * bytes_each;
    for (int byte = 0; byte < BLOCK * bytes_each; byte += 64) __builtin_prefetch(from + byte);
}

void fetch(const BufferArgs &b, i64 begin) {
    if (b.kind == FLOAT32) fetch(b.values, begin, 4);
    if (b.kind == BFLOAT16) fetch(b.values, begin, 2);
    if (b.kind == INT8) fetch(b.values, begin, 1);
}

// Compute a block's new u and v. Returns the largest |x|, as bits.
template <class T> int accumulate_block(const AccumulateArgs &a, float scale, Span s, float *u, float *v) {
    fetch(a.grad, s.begin, sizeof(T));
    fetch(a.old_residual, s.begin);
    fetch(a.old_velocity, s.begin);
    const Correction c = a.correction;
    float x[BLOCK];
    const int largest = scaled((const T *)a.grad + s.begin, scale, s.length, x);
    const float *old_v = decode(a.old_residual, s, v);
    if (a.velocity.kind == ABSENT) {
#pragma omp simd
        for (int j = 0; j < s.length; j++) v[j] = old_v[j] + x[j] * c.v_gain;
        return largest;
    }
    const float *old_u = decode(a.old_velocity, s, u);
#pragma omp simd
    for (int j = 0; j < s.length; j++) {
        u[j] = old_u[j] * c.u_decay + x[j] * c.u_gain;
        v[j] = old_v[j] + (u[j] * c.v_from_u + x[j] * c.v_gain);
    }
    return largest;
}

// ---- select -------------------------------------------------------------------------------------------

// Blocks that lie side by side, and what was seen in them: one thread's share.
struct Part {
    i64 begin, end, count, listed;
    i64 *indices;
    float *values, *velocities;
    int largest, bins[BINS];
};

// A block's places where x reaches the threshold and is not 0. Flags are looked at eight at a time.
int places_above(const float *x, int length, float threshold, int *places) {
    unsigned char flags[BLOCK] = {};
#pragma omp simd
    for (int j = 0; j < length; j++) flags[j] = (fabsf(x[j]) >= threshold) & (x[j] != 0.0f);
    int count = 0;
    for (int first = 0; first < length; first += 8) {
        u64 eight;
        __builtin_memcpy(&eight, flags + first, 8);
        for (; eight; eight &= eight - 1) places[count++] = first + __builtin_ctzll(eight) / 8;
    }
    return count;
}

// List what reaches the threshold in a block, as far as there is room; returns at how many places it was.
// u is only looked at where velocities are wanted.
int list_in_block(const AccumulateArgs &a, Part &part, i64 block, Span s, const float *u, const float *v,
                  int *places) {
    if (block % a.sample_every == a.sample_first)
        for (int j = 0; j < s.length; j++) part.bins[magnitude_bits(v[j]) >> BIN_SHIFT]++;
    if (largest_bits(v, s.length) < (int)as_bits(a.threshold)) return 0;
    const int count = places_above(v, s.length, a.threshold, places);
    const int taken = (int)(a.capacity - part.listed < count ? a.capacity - part.listed : count);
    for (int i = 0; i < taken; i++, part.listed++) {
        part.indices[part.listed] = s.begin + places[i];
        part.values[part.listed] = v[places[i]];
        if (a.velocities) part.velocities[part.listed] = u[places[i]];
    }
    part.count += count;
    return taken;
}

template <class T> void pass_over(const AccumulateArgs &a, Part &part) {
    const float scale = a.scale ? *a.scale : 1.0f;
    const bool is_large = a.n >= STREAM_FROM;
    const bool stream_u = is_large && a.velocity.values != a.old_velocity.values;
    const bool stream_v = is_large && a.residual.values != a.old_residual.values && a.residual.values != a.grad;
    for (i64 block = part.begin; block < part.end; block++) {
        const Span s(block, a.n);
        float u[BLOCK], v[BLOCK];
        int places[BLOCK];
        part.largest = max_of(part.largest, accumulate_block<T>(a, scale, s, u, v));
        const int taken = a.indices ? list_in_block(a, part, block, s, u, v, places) : 0;
        store(a.velocity, s, u, a.velocity_key, places, a.velocities ? taken : 0, stream_u);
        store(a.residual, s, v, a.residual_key, places, taken, stream_v);
    }
}

void clear(const BufferArgs &b, i64 at) {
    if (b.kind == FLOAT32) ((float *)b.values)[at] = 0.0f;
    if (b.kind == BFLOAT16) ((bf16 *)b.values)[at].bits = 0;
    if (b.kind == INT8) ((signed char *)b.values)[at] = 0;
}

// Select from what is stored; only what is taken out is written.
void pass_over_stored(const AccumulateArgs &a, Part &part) {
    for (i64 block = part.begin; block < part.end; block++) {
        const Span s(block, a.n);
        float u_room[BLOCK], v_room[BLOCK];
        int places[BLOCK];
        const float *v = decode(a.residual, s, v_room);
        const float *u = a.velocities ? decode(a.velocity, s, u_room) : zeros;
        const int taken = list_in_block(a, part, block, s, u, v, places);
        for (int i = 0; i < taken; i++) {
            clear(a.residual, s.begin + places[i]);
            if (a.velocities) clear(a.velocity, s.begin + places[i]);
        }
    }
}

void pass_over_part(const AccumulateArgs &a, Part &part) {
    if (!a.grad) return pass_over_stored(a, part);
    if (a.dtype == 1) return pass_over<bf16>(a, part);
    if (a.dtype == 2) return pass_over<f16>(a, part);
    pass_over<float>(a, part);
}

// Integers that order as the magnitudes do put infinity and then NaN above all else.
void join(const AccumulateArgs &a, const Part &part) {
    a.report[0] = max_of(a.report[0], part.largest);
    if (!a.indices) return;
    const i64 count = (u32)a.report[1] + part.count, most = 0xffffffff;
    a.report[1] = (int)(u32)(count < most ? count : most);
    for (int bin = 0; bin < BINS; bin++) a.report[2 + bin] += part.bins[bin];
}

}  // namespace

// ---- what ctypes calls --------------------------------------------------------------------------------

extern "C" {

// Tells whether host_buffers.py's idea of the structures is this one's.
i64 parsimony_buffer_sizes(int which) { return which ? sizeof(BufferArgs) : sizeof(AccumulateArgs); }

// One part for each of `threads`; `listed` (threads,) becomes how many entries each has listed in its
// places. Parts lie in order, and so do the entries.
void parsimony_accumulate(const AccumulateArgs *args, i64 *listed) {
    const AccumulateArgs &a = *args;
    const i64 blocks = blocks_of(a.n);
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static, 1) num_threads(a.threads) if (a.threads > 1)
    for (int index = 0; index < a.threads; index++) {
        const InMode mode(callers);
        Part part = {};
        part.begin = blocks * index / a.threads;
        part.end = blocks * (index + 1) / a.threads;
        part.indices = a.indices + index * a.capacity;
        part.values = a.values + index * a.capacity;
        part.velocities = a.velocities + index * a.capacity;
        pass_over_part(a, part);
        listed[index] = part.listed;
#pragma omp critical
        join(a, part);
    }
}
}
