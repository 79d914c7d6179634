// The pass of buffers/ops.py for CPU tensors, with OpenMP on torch's own threads; loaded through ctypes.
//
// A tensor is walked in blocks of 256 elements, those that share a scale in 8-bit storage. A block is first
// decoded to float32 in arrays that stay in the first-level cache, then worked on, then encoded. So each way
// of storing needs one small loop to decode and one to encode, not one for each combination of buffers.
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "buffers/entry.h"
#include "runtime/float_mode.h"

namespace {

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

u32 largest_bits(const float *x, int length) {
    u32 largest = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < length; j++) largest = larger_bits(largest, magnitude_bits(x[j]));
    return largest;
}

// ---- between storage and float32: one block -----------------------------------------------------------

template <class T> void widen_all(const T *x, int length, float *out) {
#pragma omp simd
    for (int j = 0; j < length; j++) out[j] = widen(x[j]);
}

// Return where the block's values are in float32: in the buffer, or decoded into `room`.
const float *decode(const Stored &b, Span s, float *room) {
    if (b.storage == STORAGE_ABSENT) return zeros;
    if (b.storage == STORAGE_FLOAT32) return (const float *)b.values + s.begin;
    if (b.storage == STORAGE_BFLOAT16) {
        widen_all((const bf16 *)b.values + s.begin, s.length, room);
        return room;
    }
    const signed char *codes = (const signed char *)b.values + s.begin;
    const float scale = b.scales[s.begin / BLOCK];
#pragma omp simd
    for (int j = 0; j < s.length; j++) room[j] = (float)codes[j] * scale;
    return room;
}

// Copy without filling the caches, for buffers so large that they would be gone from the caches before
// they are read again.
void stream(const float *x, int length, float *out) {
    int j = 0;
#if defined(__SSE2__)
    for (; j < length && (size_t)(out + j) % 16; j++) out[j] = x[j];
    for (; j + 4 <= length; j += 4) _mm_stream_ps(out + j, _mm_loadu_ps(x + j));
#endif
    for (; j < length; j++) out[j] = x[j];
}

// Store a block, with zeros at these offsets. The scale is that of the block before they become zeros.
void store(const Stored &b, Span s, float *x, i64 key, const int *offsets, int num_offsets,
           bool is_streamed) {
    const u32 largest = b.storage == STORAGE_BLOCKS ? largest_bits(x, s.length) : 0;
    const u32 random = folded(key), first = (u32)s.begin;
    for (int i = 0; i < num_offsets; i++) x[offsets[i]] = 0.0f;
    if (b.storage == STORAGE_FLOAT32) {
        float *out = (float *)b.values + s.begin;
        if (is_streamed) return stream(x, s.length, out);
#pragma omp simd
        for (int j = 0; j < s.length; j++) out[j] = x[j];
    }
    if (b.storage == STORAGE_BFLOAT16) {
        bf16 *out = (bf16 *)b.values + s.begin;
#pragma omp simd
        for (int j = 0; j < s.length; j++)
            out[j] = stochastic_bf16(x[j], random_bits(first + (u32)j, random));
    }
    if (b.storage == STORAGE_BLOCKS) {
        signed char *codes = (signed char *)b.values + s.begin;
        const float scale = scale_of_block(largest);
        b.scales[s.begin / BLOCK] = scale;
#pragma omp simd
        for (int j = 0; j < s.length; j++)
            codes[j] = stochastic_code(x[j], scale, random_bits(first + (u32)j, random));
    }
}

// ---- accumulate ---------------------------------------------------------------------------------------

// x = scale * grad, of a block; returns the largest |x|, as bits.
template <class T> u32 scaled(const T *grad, float scale, int length, float *x) {
    u32 largest = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < length; j++) {
        x[j] = widen(grad[j]) * scale;
        largest = larger_bits(largest, magnitude_bits(x[j]));
    }
    return largest;
}

// Prefetch a later block: while this one is hashed for rounding, the memory would be idle.
inline void fetch(const void *values, i64 begin, int bytes_each) {
    const char *from = (const char *)values + (begin + AHEAD) * bytes_each;
    for (int byte = 0; byte < BLOCK * bytes_each; byte += 64) __builtin_prefetch(from + byte);
}

void fetch(const Stored &b, i64 begin) {
    if (b.storage == STORAGE_FLOAT32) fetch(b.values, begin, 4);
    if (b.storage == STORAGE_BFLOAT16) fetch(b.values, begin, 2);
    if (b.storage == STORAGE_BLOCKS) fetch(b.values, begin, 1);
}

// Compute a block's new u and v. Returns the largest |x|, as bits.
template <class T> u32 accumulate_block(const Accumulation &a, float scale, Span s, float *u, float *v) {
    fetch(a.grad.values, s.begin, sizeof(T));
    fetch(a.old_residual, s.begin);
    fetch(a.old_velocity, s.begin);
    const Correction c = a.correction;
    float x[BLOCK];
    const u32 largest = scaled((const T *)a.grad.values + s.begin, scale, s.length, x);
    const float *old_v = decode(a.old_residual, s, v);
    if (a.velocity.storage == STORAGE_ABSENT) {
#pragma omp simd
        for (int j = 0; j < s.length; j++) v[j] = old_v[j] + change(x[j], c);
        return largest;
    }
    const float *old_u = decode(a.old_velocity, s, u);
#pragma omp simd
    for (int j = 0; j < s.length; j++) {
        u[j] = new_velocity(old_u[j], x[j], c);
        v[j] = old_v[j] + change(u[j], x[j], c);
    }
    return largest;
}

// ---- select -------------------------------------------------------------------------------------------

// Blocks that lie side by side, and what was seen in them: one thread's share.
struct Part {
    i64 begin, end, count, listed;
    i64 *indices;
    float *values, *velocities;
    u32 largest, bins[BINS];
};

// Find the offsets in a block where x is above the threshold. Eight comparisons are looked at at a time.
int offsets_above(const float *x, int length, float threshold, int *offsets) {
    unsigned char flags[BLOCK] = {};
#pragma omp simd
    for (int j = 0; j < length; j++) flags[j] = is_above(x[j], threshold);
    int count = 0;
    for (int first = 0; first < length; first += 8) {
        u64 eight;
        __builtin_memcpy(&eight, flags + first, 8);
        for (; eight; eight &= eight - 1) offsets[count++] = first + __builtin_ctzll(eight) / 8;
    }
    return count;
}

// List a block's entries that are above the threshold, as far as there is room; returns how many are
// listed, with their offsets. u is read only if velocities are listed, too.
int list_in_block(const Accumulation &a, Part &part, i64 block, Span s, const float *u, const float *v,
                  int *offsets) {
    if (block % a.sample_every == a.sample_first)
        for (int j = 0; j < s.length; j++) part.bins[magnitude_bits(v[j]) >> BIN_SHIFT]++;
    if (largest_bits(v, s.length) < magnitude_bits(a.threshold)) return 0;
    const int count = offsets_above(v, s.length, a.threshold, offsets);
    const int taken = (int)(a.capacity - part.listed < count ? a.capacity - part.listed : count);
    for (int i = 0; i < taken; i++, part.listed++) {
        part.indices[part.listed] = a.first + s.begin + offsets[i];
        part.values[part.listed] = v[offsets[i]];
        if (a.velocities) part.velocities[part.listed] = u[offsets[i]];
    }
    part.count += count;
    return taken;
}

// v = old + change(x), of a block, where there is no velocity. Returns the largest |x|, and |v| in
// `largest_v`, as bits. v may take old's place, or the gradient's.
u32 add_block(const float *grad, float scale, const float *old_v, const Correction &c, int length, float *v,
              u32 *largest_v) {
    u32 largest = 0, most = 0;
#pragma omp simd reduction(max : largest, most)
    for (int j = 0; j < length; j++) {
        const float x = grad[j] * scale;
        largest = larger_bits(largest, magnitude_bits(x));
        v[j] = old_v[j] + change(x, c);
        most = larger_bits(most, magnitude_bits(v[j]));
    }
    *largest_v = most;
    return largest;
}

// Gradient and residual are float32, and there is no velocity: in one loop, straight from memory to memory.
void pass_over_plain(const Accumulation &a, Part &part) {
    const float scale = a.scale ? *a.scale : 1.0f;
    const u32 least = magnitude_bits(a.threshold);
    for (i64 block = part.begin; block < part.end; block++) {
        const Span s(block, a.numel);
        fetch(a.grad.values, s.begin, sizeof(float));
        fetch(a.old_residual, s.begin);
        float *v = (float *)a.residual.values + s.begin;
        const float *old_v = a.old_residual.values ? (const float *)a.old_residual.values + s.begin : zeros;
        u32 largest_v;
        const u32 largest = add_block((const float *)a.grad.values + s.begin, scale, old_v, a.correction,
                                      s.length, v, &largest_v);
        part.largest = larger_bits(part.largest, largest);
        const bool is_sampled = a.indices && block % a.sample_every == a.sample_first;
        if (!a.indices || (!is_sampled && largest_v < least)) continue;
        int offsets[BLOCK];
        const int taken = list_in_block(a, part, block, s, zeros, v, offsets);
        for (int i = 0; i < taken; i++) v[offsets[i]] = 0.0f;
    }
}

template <class T> void pass_over(const Accumulation &a, Part &part) {
    const float scale = a.scale ? *a.scale : 1.0f;
    const bool is_large = a.numel >= STREAM_FROM;
    const bool stream_u = is_large && a.velocity.values != a.old_velocity.values;
    const bool is_read = a.residual.values == a.old_residual.values || a.residual.values == a.grad.values;
    const bool stream_v = is_large && !is_read;
    for (i64 block = part.begin; block < part.end; block++) {
        const Span s(block, a.numel);
        float u[BLOCK], v[BLOCK];
        int offsets[BLOCK];
        part.largest = larger_bits(part.largest, accumulate_block<T>(a, scale, s, u, v));
        const int taken = a.indices ? list_in_block(a, part, block, s, u, v, offsets) : 0;
        store(a.velocity, s, u, a.velocity_key, offsets, a.velocities ? taken : 0, stream_u);
        store(a.residual, s, v, a.residual_key, offsets, taken, stream_v);
    }
}

// Leave the residual as it was before the step, and velocities that are still to be added to it.
template <class T> void pass_over_lagging(const Accumulation &a, Part &part) {
    const float scale = a.scale ? *a.scale : 1.0f;
    const bool is_streamed = a.numel >= STREAM_FROM && a.velocity.values != a.grad.values;
    const Correction c = a.correction;
    for (i64 block = part.begin; block < part.end; block++) {
        const Span s(block, a.numel);
        fetch(a.grad.values, s.begin, sizeof(T));
        fetch(a.residual, s.begin);
        fetch(a.old_velocity, s.begin);
        float x[BLOCK], u[BLOCK], v[BLOCK];
        int offsets[BLOCK];
        const u32 largest = scaled((const T *)a.grad.values + s.begin, scale, s.length, x);
        part.largest = larger_bits(part.largest, largest);
        const float *old_u = (const float *)a.old_velocity.values + s.begin;
        float *old_v = (float *)a.residual.values + s.begin;
        if (a.lagged) {
#pragma omp simd
            for (int j = 0; j < s.length; j++) old_v[j] += old_u[j];
        }
#pragma omp simd
        for (int j = 0; j < s.length; j++) {
            u[j] = new_velocity(old_u[j], x[j], c);
            v[j] = old_v[j] + u[j];
        }
        const int taken = list_in_block(a, part, block, s, u, v, offsets);
        store(a.velocity, s, u, a.velocity_key, offsets, taken, is_streamed);
    }
}

// The new velocity u and what the old residual comes to, of a block, straight in memory. Returns the largest
// |x|, and in `largest_v` the largest |old_v + u|, as bits.
u32 add_lagging_block(const float *grad, float scale, const float *old_u, const Correction &c, bool lagged,
                      int length, float *old_v, float *u, u32 *largest_v) {
    const float owed = lagged ? 1.0f : 0.0f;
    u32 largest = 0, most = 0;
#pragma omp simd reduction(max : largest, most)
    for (int j = 0; j < length; j++) {
        const float x = grad[j] * scale;
        largest = larger_bits(largest, magnitude_bits(x));
        const float v = owed != 0.0f ? old_v[j] + old_u[j] : old_v[j];
        old_v[j] = v;
        u[j] = new_velocity(old_u[j], x, c);
        most = larger_bits(most, magnitude_bits(v + u[j]));
    }
    *largest_v = most;
    return largest;
}

// The gradient is float32, and the new velocity takes its place.
void pass_over_lagging_plain(const Accumulation &a, Part &part) {
    const float scale = a.scale ? *a.scale : 1.0f;
    const u32 least = magnitude_bits(a.threshold);
    for (i64 block = part.begin; block < part.end; block++) {
        const Span s(block, a.numel);
        fetch(a.grad.values, s.begin, sizeof(float));
        fetch(a.residual, s.begin);
        fetch(a.old_velocity, s.begin);
        float *u = (float *)a.velocity.values + s.begin, *old_v = (float *)a.residual.values + s.begin;
        u32 largest_v;
        const u32 largest =
            add_lagging_block((const float *)a.grad.values + s.begin, scale,
                              (const float *)a.old_velocity.values + s.begin, a.correction, a.lagged, s.length,
                              old_v, u, &largest_v);
        part.largest = larger_bits(part.largest, largest);
        if (block % a.sample_every != a.sample_first && largest_v < least) continue;
        float v[BLOCK];
        int offsets[BLOCK];
        for (int j = 0; j < s.length; j++) v[j] = old_v[j] + u[j];
        const int taken = list_in_block(a, part, block, s, u, v, offsets);
        for (int i = 0; i < taken; i++) u[offsets[i]] = 0.0f;
    }
}

// Select from what is stored; only what is taken out is written.
void pass_over_stored(const Accumulation &a, Part &part) {
    for (i64 block = part.begin; block < part.end; block++) {
        const Span s(block, a.numel);
        float u_room[BLOCK], v_room[BLOCK];
        int offsets[BLOCK];
        const float *v = decode(a.residual, s, v_room);
        const float *u = a.velocities ? decode(a.velocity, s, u_room) : zeros;
        if (a.lags) {
            for (int j = 0; j < s.length; j++) v_room[j] = v[j] + u[j];
            v = v_room;
        }
        const int taken = list_in_block(a, part, block, s, u, v, offsets);
        for (int i = 0; i < taken; i++) {
            if (!a.lags) clear(a.residual, s.begin + offsets[i]);
            if (a.velocities) clear(a.velocity, s.begin + offsets[i]);
        }
    }
}

template <class T> void pass_over_given(const Accumulation &a, Part &part) {
    if (a.lags) return pass_over_lagging<T>(a, part);
    pass_over<T>(a, part);
}

void pass_over_part(const Accumulation &a, Part &part) {
    if (a.grad.storage == STORAGE_ABSENT) return pass_over_stored(a, part);
    if (a.grad.storage == STORAGE_BFLOAT16) return pass_over_given<bf16>(a, part);
    if (a.grad.storage == STORAGE_FLOAT16) return pass_over_given<f16>(a, part);
    const bool is_plain = a.residual.storage == STORAGE_FLOAT32 && a.velocity.storage == STORAGE_ABSENT &&
                          (a.old_residual.storage == STORAGE_FLOAT32 || !a.old_residual.values);
    const bool is_read = a.residual.values == a.old_residual.values || a.residual.values == a.grad.values;
    if (a.lags && a.velocity.values == a.grad.values) return pass_over_lagging_plain(a, part);
    if (is_plain && !a.lags && (is_read || a.numel < STREAM_FROM)) return pass_over_plain(a, part);
    pass_over_given<float>(a, part);
}

// Add what was seen in a part to the report.
void join(const Accumulation &a, const Part &part) {
    a.report[0] = larger_bits(a.report[0], part.largest);
    if (!a.indices) return;
    const i64 count = a.report[1] + part.count, most = 0xffffffff;
    a.report[1] = (u32)(count < most ? count : most);
    for (int bin = 0; bin < BINS; bin++) a.report[2 + bin] += part.bins[bin];
}

// Each thread takes one part of the tensor and lists entries in room of its own for `capacity`, in order;
// `listed` (threads,) becomes how many each has listed.
void pass_over_tensor(const Accumulation &a, i64 *listed, ModeBits callers) {
    const i64 blocks = blocks_of(a.numel);
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

// Whether an index is outside of its buffer, of `numel` elements.
bool is_outside(const Puttings &p, i64 begin, const Putting &of, i64 numel) {
    for (i64 j = begin; j < of.end; j++)
        if (p.positions[j] < of.first || p.positions[j] - of.first >= numel) return true;
    return false;
}

// Lists of entries that grow. Only `velocities` may be null.
struct Lists {
    i64 *indices;
    float *values, *velocities;

    // Append what a thread has listed. It may lie in the lists' own memory, anywhere from their ends on.
    void append(const Accumulation &a, i64 thread, i64 count) {
        const i64 at = thread * a.capacity;
        memmove(indices, a.indices + at, count * sizeof(i64));
        memmove(values, a.values + at, count * sizeof(float));
        if (a.velocities) memmove(velocities, a.velocities + at, count * sizeof(float));
        indices += count;
        values += count;
        if (velocities) velocities += count;  // also past the room of a pass that lists none
    }
};

}  // namespace

// ---- what ctypes calls --------------------------------------------------------------------------------

extern "C" {

// numels (count,): of the buffers. Returns the number of the first with an index outside of it, where nothing
// is written, or -1.
i64 parsimony_put(const Puttings *p, const i64 *numels) {
    i64 begin = 0;
    for (i64 n = 0; n < p->count; begin = p->puttings[n++].end)
        if (is_outside(*p, begin, p->puttings[n], numels[n])) return n;
    begin = 0;
    for (i64 n = 0; n < p->count; begin = p->puttings[n++].end)
        for (i64 j = begin; j < p->puttings[n].end; j++) put(*p, j, p->puttings[n]);
    return -1;
}

// Small tensors, of one thread each, are dealt out to `threads`; large ones have several threads of their
// own. indices, values, velocities: the first pass's lists, behind which those of the next lie; in the end all
// that is listed lies there without gaps, and `listed` (count,) is how much of it is each pass's.
void parsimony_accumulate(const Accumulation *passes, i64 count, int threads, i64 *indices, float *values,
                          float *velocities, i64 *listed) {
    const ModeBits callers = current_mode();
    std::vector<i64> starts(count + 1, 0);
    for (i64 n = 0; n < count; n++) starts[n + 1] = starts[n] + passes[n].threads;
    std::vector<i64> of_threads(starts[count]);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (i64 n = 0; n < count; n++) {
        const InMode mode(callers);
        if (passes[n].threads == 1) pass_over_tensor(passes[n], &of_threads[starts[n]], callers);
    }
    for (i64 n = 0; n < count; n++)
        if (passes[n].threads > 1) pass_over_tensor(passes[n], &of_threads[starts[n]], callers);
    Lists lists = {indices, values, velocities};
    for (i64 n = 0; n < count; n++) {
        listed[n] = 0;
        for (int thread = 0; thread < passes[n].threads; thread++) {
            const i64 of_thread = of_threads[starts[n] + thread];
            if (of_thread > 0) lists.append(passes[n], thread, of_thread);
            listed[n] += of_thread;
        }
    }
}
}
