// What a warp reads and writes of a buffer: one block, BLOCK elements, those that share a scale in 8-bit
// storage. A lane has EACH of them: WIDE neighbours, and the next WIDE of them after those of the other
// lanes. A block that lies wholly within buffers on boundaries of 16 bytes is read and written WIDE
// elements at a time; any other, such as the last, one by one.
#pragma once

#include "buffers/entry.h"
#include "runtime/grid.h"

const int LANES = 32, EACH = BLOCK / LANES, WIDE = 4, PARTS = EACH / WIDE, WARPS = THREADS / LANES;

// A kind of storage that is not known before the kernel runs.
const int ANY = -1;

template <int KIND> struct Element;
template <> struct Element<STORAGE_ABSENT> { typedef float type; };  // neither read nor written
template <> struct Element<STORAGE_FLOAT32> { typedef float type; };
template <> struct Element<STORAGE_BFLOAT16> { typedef bf16 type; };
template <> struct Element<STORAGE_FLOAT16> { typedef f16 type; };
template <> struct Element<STORAGE_BLOCKS> { typedef signed char type; };

template <class T> struct alignas(WIDE * sizeof(T)) Wide { T x[WIDE]; };

FN int lane_of() { return threadIdx.x % LANES; }

// A block of the buffers, and where in it this lane begins. It may lie beyond the end.
struct Span {
    i64 block, begin, numel;
    bool is_whole;
};

// Whether all buffers lie on boundaries of 16 bytes.
FN bool is_aligned(const Accumulation &s) {
    u64 bits = (u64)s.grad.values | (u64)s.residual.values | (u64)s.old_residual.values;
    return ((bits | (u64)s.velocity.values | (u64)s.old_velocity.values) & 15) == 0;
}

FN Span span_of(i64 block, i64 numel, bool is_aligned) {
    bool is_whole = is_aligned && (block + 1) * BLOCK <= numel;
    Span at = {block, block * BLOCK + lane_of() * WIDE, numel, is_whole};
    return at;
}

FN i64 element(const Span &at, int k) { return at.begin + k / WIDE * LANES * WIDE + k % WIDE; }

FN bool has_block(const Span &at) { return at.block * BLOCK < at.numel; }

// ---- reading -----------------------------------------------------------------------------------

template <class T> FN void read(const void *values, const Span &at, Wide<T> *parts) {
    const T *from = (const T *)values;
    if (at.is_whole) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) parts[p] = *(const Wide<T> *)(from + element(at, p * WIDE));
        return;
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        i64 i = element(at, k);
        parts[k / WIDE].x[k % WIDE] = i < at.numel ? from[i] : T();
    }
}

// A lane's elements of a block as they were read, so that all buffers' reads are under way before the
// first is waited for. Beyond the end elements are 0, which is no maximum and never selected.
template <int KIND> struct Held {
    Wide<typename Element<KIND>::type> parts[PARTS];
    float scale;

    FN void load(const Stored &from, const Span &at) {
        read(from.values, at, parts);
        if (KIND == STORAGE_BLOCKS) scale = has_block(at) ? from.scales[at.block] : 0.0f;
    }

    FN float operator[](int k) const {
        float x = widen(parts[k / WIDE].x[k % WIDE]);
        return KIND == STORAGE_BLOCKS ? x * scale : x;
    }
};

template <> struct Held<STORAGE_ABSENT> {
    FN void load(const Stored &, const Span &) {}
    FN float operator[](int) const { return 0.0f; }
};

template <> struct Held<ANY> {
    float x[EACH];

    template <int KIND> FN void load_as(const Stored &from, const Span &at) {
        Held<KIND> held;
        held.load(from, at);
#pragma unroll
        for (int k = 0; k < EACH; k++) x[k] = held[k];
    }

    FN void load(const Stored &from, const Span &at) {
        if (from.storage == STORAGE_FLOAT32) load_as<STORAGE_FLOAT32>(from, at);
        else if (from.storage == STORAGE_BFLOAT16) load_as<STORAGE_BFLOAT16>(from, at);
        else if (from.storage == STORAGE_FLOAT16) load_as<STORAGE_FLOAT16>(from, at);
        else if (from.storage == STORAGE_BLOCKS) load_as<STORAGE_BLOCKS>(from, at);
        else load_as<STORAGE_ABSENT>(from, at);
    }

    FN float operator[](int k) const { return x[k]; }
};

// ---- writing -----------------------------------------------------------------------------------

// All of the warp must come here together.
FN float scale_of(const float *x) {
    u32 largest = 0;
    for (int k = 0; k < EACH; k++) largest = larger_bits(largest, magnitude_bits(x[k]));
    return scale_of_block(max_over_lanes(largest, LANES));
}

// In one go: a structure's copy the compiler may split.
FN void write(float *out, const Wide<float> &p) {
#if defined(__CUDACC__)
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(out)), "f"(p.x[0]), "f"(p.x[1]), "f"(p.x[2]), "f"(p.x[3])
                 : "memory");
#else
    *(Wide<float> *)out = p;
#endif
}

FN void write(bf16 *out, const Wide<bf16> &p) {
    u64 low = p.x[0].bits | (u32)p.x[1].bits << 16, high = p.x[2].bits | (u32)p.x[3].bits << 16;
    *(u64 *)out = high << 32 | low;
}

FN void write(signed char *out, const Wide<signed char> &p) {
    u32 low = (u32)(unsigned char)p.x[0] | (u32)(unsigned char)p.x[1] << 8;
    *(u32 *)out = low | (u32)(unsigned char)p.x[2] << 16 | (u32)(unsigned char)p.x[3] << 24;
}

FN void encode(float x, float, u32, float &code) { code = x; }
FN void encode(float x, float, u32 random, bf16 &code) { code = stochastic_bf16(x, random); }
FN void encode(float x, float scale, u32 random, signed char &code) {
    code = stochastic_code(x, scale, random);
}

// Bit k of `zeroed`: the lane's k-th element becomes 0. The scale is that of the elements as they are.
template <int KIND>
FN void store_as(const Stored &to, const Span &at, i64 key, const float *x, u32 zeroed) {
    typedef typename Element<KIND>::type T;
    const u32 random = folded(key);
    float scale = KIND == STORAGE_BLOCKS ? scale_of(x) : 1.0f;
    if (KIND == STORAGE_BLOCKS && lane_of() == 0 && has_block(at)) to.scales[at.block] = scale;
    Wide<T> parts[PARTS];
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        float value = zeroed >> k & 1 ? 0.0f : x[k];
        encode(value, scale, random_bits(element(at, k), random), parts[k / WIDE].x[k % WIDE]);
    }
    T *out = (T *)to.values;
    if (at.is_whole) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) write(out + element(at, p * WIDE), parts[p]);
        return;
    }
#pragma unroll
    for (int k = 0; k < EACH; k++)
        if (element(at, k) < at.numel) out[element(at, k)] = parts[k / WIDE].x[k % WIDE];
}

template <int KIND>
FN void store(const Stored &to, const Span &at, i64 key, const float *x, u32 zeroed) {
    if (KIND != ANY) return store_as<KIND == ANY ? STORAGE_FLOAT32 : KIND>(to, at, key, x, zeroed);
    if (to.storage == STORAGE_FLOAT32) store_as<STORAGE_FLOAT32>(to, at, key, x, zeroed);
    if (to.storage == STORAGE_BFLOAT16) store_as<STORAGE_BFLOAT16>(to, at, key, x, zeroed);
    if (to.storage == STORAGE_BLOCKS) store_as<STORAGE_BLOCKS>(to, at, key, x, zeroed);
}
