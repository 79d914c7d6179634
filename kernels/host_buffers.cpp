// The passes of buffers.py for CPU tensors, on the same terms as host.cpp, with which it is compiled.
//
// A tensor is walked in blocks of 256 elements, those that share a scale in 8-bit storage. A block passes
// through arrays that stay in the first-level cache: what it is stored as, before and after, is chosen for
// a block and not for an element, so that each way is one small loop and needs no product of all ways.
#include <cmath>

#include "common.h"

namespace {

// ---- what buffers.py hands over; host_buffers.py mirrors these ----------------------------------------

enum Kind { ABSENT, FLOAT32, BFLOAT16, INT8 };

struct BufferArgs {
    void *values;
    float *scales;  // of INT8
    i64 kind;
};

struct Correction {  // mirrors kernels.operands.Correction
    float u_decay, u_gain, v_from_u, v_gain;
};

struct AccumulateArgs {
    const void *grad;
    const float *scale;  // null: 1
    BufferArgs residual, old_residual, velocity, old_velocity;
    i64 n, residual_key, velocity_key;
    int dtype, threads;
    Correction correction;
};

const int BLOCK = 256;
const float LEVELS = 127.0f, MIN_SCALE = 1e-30f;
const i64 AHEAD = 2 * BLOCK;        // elements
const i64 PARALLEL_FROM = 1 << 15;  // elements; below, starting threads costs more than it saves
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

// Where the block's new values are to be written before `encode`.
float *target(const BufferArgs &b, Span s, float *room) {
    return b.kind == FLOAT32 ? (float *)b.values + s.begin : room;
}

void encode(const BufferArgs &b, Span s, const float *x, i64 key) {
    const u32 random = folded(key);
    const u32 first = (u32)s.begin;
    if (b.kind == BFLOAT16) {
        bf16 *out = (bf16 *)b.values + s.begin;
#pragma omp simd
        for (int j = 0; j < s.length; j++) out[j] = stochastic_bf16(x[j], random_bits(first + (u32)j, random));
    }
    if (b.kind == INT8) {
        signed char *codes = (signed char *)b.values + s.begin;
        float scale = as_float((u32)largest_bits(x, s.length)) / LEVELS;
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

template <class T> int accumulate_block(const AccumulateArgs &a, float scale, Span s) {
    fetch(a.grad, s.begin, sizeof(T));
    fetch(a.old_residual, s.begin);
    fetch(a.old_velocity, s.begin);
    const Correction c = a.correction;
    float x[BLOCK], u_room[BLOCK], v_room[BLOCK];
    const int largest = scaled((const T *)a.grad + s.begin, scale, s.length, x);
    const float *old_v = decode(a.old_residual, s, v_room);
    float *v = target(a.residual, s, v_room);
    if (a.velocity.kind == ABSENT) {
#pragma omp simd
        for (int j = 0; j < s.length; j++) v[j] = old_v[j] + x[j] * c.v_gain;
    } else {
        const float *old_u = decode(a.old_velocity, s, u_room);
        float *u = target(a.velocity, s, u_room);
#pragma omp simd
        for (int j = 0; j < s.length; j++) {
            u[j] = old_u[j] * c.u_decay + x[j] * c.u_gain;
            v[j] = old_v[j] + (u[j] * c.v_from_u + x[j] * c.v_gain);
        }
        encode(a.velocity, s, u, a.velocity_key);
    }
    encode(a.residual, s, v, a.residual_key);
    return largest;
}

// Integers that order as the magnitudes do put infinity and then NaN above all else.
template <class T> float accumulate(const AccumulateArgs &a) {
    const float scale = a.scale ? *a.scale : 1.0f;
    int largest = 0;
#pragma omp parallel for schedule(static) num_threads(a.threads) reduction(max : largest) \
    if (a.threads > 1 && a.n >= PARALLEL_FROM)
    for (i64 b = 0; b < blocks_of(a.n); b++)
        largest = max_of(largest, accumulate_block<T>(a, scale, Span(b, a.n)));
    return as_float((u32)largest);
}

// ---- select above -------------------------------------------------------------------------------------

inline bool is_above(float x, float threshold) { return fabsf(x) >= threshold && x != 0.0f; }

int count_above(const BufferArgs &b, Span s, float threshold) {
    float room[BLOCK];
    const float *x = decode(b, s, room);
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (int j = 0; j < s.length; j++) count += is_above(x[j], threshold);
    return count;
}

void list_above(const BufferArgs &b, Span s, float threshold, i64 *out) {
    float room[BLOCK];
    const float *x = decode(b, s, room);
    for (int j = 0; j < s.length; j++)
        if (is_above(x[j], threshold)) *out++ = s.begin + j;
}

}  // namespace

// ---- what ctypes calls --------------------------------------------------------------------------------

extern "C" {

// Tells whether host_buffers.py's idea of the structures is this one's.
i64 parsimony_buffer_sizes(int which) { return which ? sizeof(BufferArgs) : sizeof(AccumulateArgs); }

float parsimony_accumulate(const AccumulateArgs *a) {
    if (a->dtype == 1) return accumulate<bf16>(*a);
    if (a->dtype == 2) return accumulate<f16>(*a);
    return accumulate<float>(*a);
}

// starts (blocks + 1,): how many are above before each block, and in all.
void parsimony_count_above(const BufferArgs *buffer, i64 n, float threshold, i64 *starts, int threads) {
    starts[0] = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n >= PARALLEL_FROM)
    for (i64 b = 0; b < blocks_of(n); b++) starts[b + 1] = count_above(*buffer, Span(b, n), threshold);
    for (i64 b = 0; b < blocks_of(n); b++) starts[b + 1] += starts[b];
}

void parsimony_list_above(const BufferArgs *buffer, i64 n, float threshold, const i64 *starts, i64 *out,
                          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n >= PARALLEL_FROM)
    for (i64 b = 0; b < blocks_of(n); b++)
        if (starts[b + 1] > starts[b]) list_above(*buffer, Span(b, n), threshold, out + starts[b]);
}
}
