// The operations of packing/ops.py for CPU tensors, but for merge.cpp's; loaded through ctypes.
//
// `pack` and `unpack` run on the caller's thread: a message is a few tens of kilobytes, which takes less
// time than starting others.
#include <cmath>
#include <cstring>

#include "packing/layout.h"

namespace {

// ---- values -------------------------------------------------------------------------------------------

inline int group_length(i64 group, i64 n) {
    return (int)(n - group * GROUP < GROUP ? n - group * GROUP : GROUP);
}

u32 largest_bits(const float *x, int length) {
    u32 largest = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < length; j++) largest = larger_bits(largest, magnitude_bits(x[j]));
    return largest;
}

// The codes of a group, one a byte; returns its scale.
template <class E> u32 code_group(const float *x, int length, unsigned char *codes) {
    const u32 scale = scale_of<E>(largest_bits(x, length));
#pragma omp simd
    for (int j = 0; j < length; j++) codes[j] = (unsigned char)code_of<E>(x[j], scale);
    return scale;
}

template <class E> void round_groups(const float *x, i64 n, float *out) {
    unsigned char codes[GROUP];
    for (i64 g = 0; g * GROUP < n; g++, x += GROUP, out += GROUP) {
        const int length = group_length(g, n);
        const u32 scale = code_group<E>(x, length, codes);
#pragma omp simd
        for (int j = 0; j < length; j++) out[j] = value_of<E>(codes[j], scale);
    }
}

void write_bytes(unsigned char *out, const unsigned char *codes, int length, E4M3) {
    memcpy(out, codes, length);
}

void write_bytes(unsigned char *out, const unsigned char *codes, int length, E2M1) {
    for (int j = 0; j < length; j += 2)
        out[j / 2] = (unsigned char)(codes[j] | (j + 1 < length ? codes[j + 1] << 4 : 0));
}

void read_bytes(const unsigned char *in, unsigned char *codes, int length, E4M3) {
    memcpy(codes, in, length);
}

void read_bytes(const unsigned char *in, unsigned char *codes, int length, E2M1) {
    for (int j = 0; j < length; j++) codes[j] = in[j / 2] >> (4 * (j & 1)) & 15;
}

template <class E> void pack_groups(const Sections &s, const float *x, u32 *words) {
    unsigned char codes[GROUP], *out = (unsigned char *)(words + s.values);
    unsigned char *scales = (unsigned char *)(words + s.scales);
    for (i64 g = 0; g * GROUP < s.num_values; g++) {
        const int length = group_length(g, s.num_values);
        scales[g] = (unsigned char)code_group<E>(x + g * GROUP, length, codes);
        write_bytes(out + g * GROUP * value_bits(s) / 8, codes, length, E());
    }
}

template <class E> void unpack_groups(const Sections &s, const u32 *words, float *out) {
    unsigned char codes[GROUP];
    const unsigned char *in = (const unsigned char *)(words + s.values);
    const unsigned char *scales = (const unsigned char *)(words + s.scales);
    for (i64 g = 0; g * GROUP < s.num_values; g++, out += GROUP) {
        const int length = group_length(g, s.num_values);
        const u32 scale = scales[g];
        read_bytes(in + g * GROUP * value_bits(s) / 8, codes, length, E());
#pragma omp simd
        for (int j = 0; j < length; j++) out[j] = value_of<E>(codes[j], scale);
    }
}

void pack_values(const Sections &s, const float *x, u32 *words) {
    if (s.value_coding == VALUE_FLOAT32) memcpy(words + s.values, x, 4 * s.num_values);
    if (s.value_coding == VALUE_MXFP8) pack_groups<E4M3>(s, x, words);
    if (s.value_coding == VALUE_MXFP4) pack_groups<E2M1>(s, x, words);
    if (s.value_coding != VALUE_FLOAT16) return;
    f16 halves[GROUP];  // copied: memory of words may not be written as if it were of others
    for (i64 g = 0; g * GROUP < s.num_values; g++) {
        const int length = group_length(g, s.num_values);
#pragma omp simd
        for (int j = 0; j < length; j++) halves[j] = narrow_within_range(x[g * GROUP + j]);
        memcpy(words + s.values + g * GROUP / 2, halves, 2 * length);
    }
}

void unpack_values(const Sections &s, const u32 *words, float *out) {
    if (s.value_coding == VALUE_FLOAT32) memcpy(out, words + s.values, 4 * s.num_values);
    if (s.value_coding == VALUE_MXFP8) unpack_groups<E4M3>(s, words, out);
    if (s.value_coding == VALUE_MXFP4) unpack_groups<E2M1>(s, words, out);
    if (s.value_coding != VALUE_FLOAT16) return;
    f16 halves[GROUP];
    for (i64 g = 0; g * GROUP < s.num_values; g++) {
        const int length = group_length(g, s.num_values);
        memcpy(halves, words + s.values + g * GROUP / 2, 2 * length);
#pragma omp simd
        for (int j = 0; j < length; j++) out[g * GROUP + j] = widen(halves[j]);
    }
}

bool are_finite(const float *x, i64 n) {
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (i64 i = 0; i < n; i++) count |= !is_finite(x[i]);
    return count == 0;
}

// ---- positions ----------------------------------------------------------------------------------------

void pack_positions(const Sections &s, const i64 *positions, u32 *words) {
    u32 *out = words + s.indices;
    if (s.index_coding == INDEX_INT64) memcpy(out, positions, 8 * s.num_entries);
    if (s.index_coding == INDEX_INT32)
        for (i64 i = 0; i < s.num_entries; i++) out[i] = (u32)positions[i];
    if (s.index_coding != INDEX_ELIAS_FANO) return;
    for (i64 i = 0; i < s.num_entries; i++) {
        const i64 bit = (positions[i] >> s.low_bits) + i;
        out[bit >> 5] |= 1u << (bit & 31);
    }
    if (s.low_bits == 0) return;
    for (i64 w = 0; w < words_of(s.num_entries * s.low_bits); w++)
        words[s.low + w] = low_word(s, positions, w);
}

int unpack_coded(const Sections &s, const u32 *words, i64 *positions) {
    i64 rank = 0;
    for (i64 w = 0; w < words_of(upper_length(s)); w++)
        for (u32 bits = words[s.indices + w]; bits; bits &= bits - 1, rank++) {
            if (rank == s.num_entries) return PROBLEM_COUNT;
            positions[rank] = coded_position(s, words, 32 * w + __builtin_ctz(bits), rank);
        }
    return rank == s.num_entries ? 0 : PROBLEM_COUNT;
}

int unpack_positions(const Sections &s, const u32 *words, i64 *positions) {
    if (s.index_coding == INDEX_ELIAS_FANO) {
        const int problem = unpack_coded(s, words, positions);
        if (problem) return problem;
    } else {
        for (i64 i = 0; i < s.num_entries; i++) positions[i] = plain_position(s, words, i);
    }
    return order_problems(positions, s.num_entries, s.universe);
}

u32 checksum(const u32 *words, i64 n) {
    u32 sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < n; i++) sum += checked(words[i], i);
    return sum - checked(words[CHECKSUM_WORD], CHECKSUM_WORD);
}

}  // namespace

// ---- what ctypes calls --------------------------------------------------------------------------------

extern "C" {

void parsimony_round_values(const float *x, i64 n, int coding, float *out) {
    if (coding == VALUE_MXFP8) return round_groups<E4M3>(x, n, out);
    if (coding == VALUE_MXFP4) return round_groups<E2M1>(x, n, out);
#pragma omp simd
    for (i64 i = 0; i < n; i++) out[i] = widen(narrow_within_range(x[i]));
}

// `words` has header and flags, and is 0 behind them. Returns what is wrong with the positions, or 0.
int parsimony_pack(const Sections *s, const i64 *positions, const float *values, u32 *words) {
    const int problem = order_problems(positions, s->num_entries, s->universe);
    if (problem) return problem;
    pack_positions(*s, positions, words);
    pack_values(*s, values, words);
    words[CHECKSUM_WORD] = checksum(words, s->end);
    return 0;
}

// The sections were checked against the message's length. Returns the first problem that is found, or 0.
int parsimony_unpack(const Sections *s, const u32 *words, i64 *positions, float *values) {
    if (checksum(words, s->end) != words[CHECKSUM_WORD]) return PROBLEM_CHECKSUM;
    const int problem = unpack_positions(*s, words, positions);
    if (problem) return problem;
    unpack_values(*s, words, values);
    if (!are_finite(values, s->num_values)) return PROBLEM_NOT_FINITE;
    return is_padding_zero(*s, words) ? 0 : PROBLEM_PADDING;
}
}
