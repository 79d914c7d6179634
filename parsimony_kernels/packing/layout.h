// Messages as dgc/wire/codec.py describes them: what the host's and the device's sources share.
#pragma once

#include "runtime/arithmetic.h"

// What a word adds to the checksum. `mix` is a bijection, so another word at this index is certain to
// add something else.
FN u32 checked(u32 word, i64 index) { return mix(word ^ mix((u32)index)); }

// ---- bits ----------------------------------------------------------------------------------------

FN i64 words_of(i64 bits) { return (bits + 31) / 32; }

FN i64 upper_length(const Sections &s) {
    return s.num_entries > 0 ? s.num_entries + (s.universe >> s.low_bits) + 1 : 0;
}

// `length` bits from `bit` on; reads only the words in which they lie.
FN u64 field(const u32 *words, i64 bit, int length) {
    u64 value = 0;
    for (int have = 0; have < length;) {
        int from = (int)((bit + have) & 31), take = 32 - from;
        if (take > length - have) take = length - have;
        u64 part = (words[(bit + have) >> 5] >> from) & ((1ull << take) - 1);
        value |= part << have;
        have += take;
    }
    return value;
}

// Word `w` of the positions' low bits.
FN u32 low_word(const Sections &s, const i64 *positions, i64 w) {
    u32 word = 0;
    const u64 mask = (1ull << s.low_bits) - 1;
    for (i64 i = 32 * w / s.low_bits; i < s.num_entries && i * s.low_bits < 32 * w + 32; i++) {
        u64 low = (u64)positions[i] & mask;
        i64 at = i * s.low_bits - 32 * w;
        word |= (u32)(at >= 0 ? low << at : low >> -at);
    }
    return word;
}

// The last of a part's words may have bits that nothing uses.
FN bool is_padded_with_zeros(const u32 *words, i64 start, i64 used_bits) {
    int last = (int)(used_bits & 31);
    return last == 0 || words[start + used_bits / 32] >> last == 0;
}

FN int value_bits(const Sections &s) { return 32 >> s.value_coding; }

FN bool is_in_groups(const Sections &s) { return s.value_coding >= VALUE_MXFP8; }

// Where the parts of a message of so many entries lie, as message.py's `sections` has it. `form` has
// the universe and the codings; values that share a scale are in groups.
FN Sections laid_out(const Sections &form, i64 num_entries, i64 dim, i64 flag_words) {
    Sections s = form;
    s.num_entries = num_entries;
    s.num_values = num_entries * dim;
    s.low_bits = 0;
    i64 low_words = 0, index_words = num_entries * (s.index_coding == INDEX_INT64 ? 2 : 1);
    if (s.index_coding == INDEX_ELIAS_FANO) {
        if (num_entries > 0 && s.universe > num_entries)
            while ((s.universe / num_entries) >> (s.low_bits + 1)) s.low_bits++;
        index_words = words_of(upper_length(s));
        low_words = words_of(num_entries * s.low_bits);
    }
    s.indices = HEADER_WORDS + flag_words;
    s.low = s.indices + index_words;
    s.values = s.low + low_words;
    s.scales = s.values + words_of(s.num_values * value_bits(s));
    const i64 groups = is_in_groups(s) ? (s.num_values + GROUP - 1) / GROUP : 0;
    s.end = s.scales + words_of(8 * groups);
    return s;
}

FN bool is_padding_zero(const Sections &s, const u32 *words) {
    bool is_zero = is_padded_with_zeros(words, s.values, s.num_values * value_bits(s));
    if (s.index_coding == INDEX_ELIAS_FANO)
        is_zero = is_zero && is_padded_with_zeros(words, s.indices, upper_length(s)) &&
                  is_padded_with_zeros(words, s.low, s.num_entries * s.low_bits);
    if (is_in_groups(s)) {
        i64 groups = (s.num_values + GROUP - 1) / GROUP;
        is_zero = is_zero && is_padded_with_zeros(words, s.scales, groups * 8);
    }
    return is_zero;
}

FN i64 plain_position(const Sections &s, const u32 *words, i64 i) {
    if (s.index_coding == INDEX_INT32) return (i64)(int)words[s.indices + i];
    u64 low = words[s.indices + 2 * i], high = words[s.indices + 2 * i + 1];
    return (i64)(high << 32 | low);
}

// What is wrong with positions that should ascend within the universe. For the host: all in one loop.
FN int order_problems(const i64 *positions, i64 n, i64 universe) {
    if (n == 0) return 0;
    int descents = 0;
    for (i64 i = 1; i < n; i++) descents |= positions[i] <= positions[i - 1];
    if (descents) return PROBLEM_ORDER;  // the ends do not bound the others then
    return positions[0] < 0 || positions[n - 1] >= universe ? PROBLEM_OUTSIDE : 0;
}

// The `rank`th position, whose bit is the upper part's `bit`th.
FN i64 coded_position(const Sections &s, const u32 *words, i64 bit, i64 rank) {
    u64 low = field(words + s.low, rank * s.low_bits, s.low_bits);
    return (i64)((u64)(bit - rank) << s.low_bits | low);
}

// ---- values --------------------------------------------------------------------------------------

FN f16 narrow_within_range(float x) {
    return narrow<f16>(smaller(larger(x, -65504.0f), 65504.0f));
}

// OCP Microscaling Formats v1.0: elements with MANTISSA bits behind the point, an exponent biased by
// BIAS, and LARGEST as the code of the largest finite number, which has the exponent EMAX. E4M3 has a
// NaN of either sign; there are no infinities.
struct E4M3 {
    enum : int { MANTISSA = 3, BIAS = 7, LARGEST = 0x7e, EMAX = 8, SIGN = 0x80, NOT_A_NUMBER = 0x7f };
};
struct E2M1 {
    enum : int { MANTISSA = 1, BIAS = 1, LARGEST = 7, EMAX = 2, SIGN = 8, NOT_A_NUMBER = -1 };
};

// The scale 2^(scale - 127) of a group, from the largest magnitude in it, as bits.
template <class E> FN u32 scale_of(u32 largest) {
    int scale = (int)(largest >> 23) - E::EMAX;
    return scale < 0 ? 0u : (u32)scale;
}

// x / 2^(scale - 127) to the nearest code, ties to even, at most the largest.
template <class E> FN u32 code_of(float x, u32 scale) {
    const u32 sign = as_bits(x) >> 31 ? (u32)E::SIGN : 0u;
    u32 bits = as_bits(x * as_float((254u - scale) << 23)) & 0x7fffffffu;
    const int shift = 23 - E::MANTISSA;
    u32 normal = ((bits + (1u << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift) -
                 ((127u - E::BIAS) << E::MANTISSA);
    const u32 unit = (127u + 24 - E::BIAS - E::MANTISSA) << 23;  // its last bit is a subnormal's
    u32 subnormal = as_bits(as_float(bits) + as_float(unit)) - unit;
    u32 code = bits < (128u - E::BIAS) << 23 ? subnormal : normal;
    return sign | (code > (u32)E::LARGEST ? (u32)E::LARGEST : code);
}

// Exact. A scale of 255 gives infinity or NaN, whatever the code.
template <class E> FN float value_of(u32 code, u32 scale) {
    const u32 magnitude = code & (u32)(E::SIGN - 1);
    const float least = as_float((128u - E::BIAS - E::MANTISSA) << 23);
    float subnormal = (float)(int)magnitude * least;
    float normal = as_float((magnitude << (23 - E::MANTISSA)) + ((127u - E::BIAS) << 23));
    float x = magnitude >> E::MANTISSA ? normal : subnormal;
    x = (int)magnitude == E::NOT_A_NUMBER ? as_float(0x7fc00000u) : x;
    x *= as_float(scale > 0 ? scale << 23 : 0x400000u);
    return as_float(as_bits(x) | (code & (u32)E::SIGN ? 0x80000000u : 0u));
}

FN bool is_finite(float x) { return (as_bits(x) & 0x7f800000u) != 0x7f800000u; }
