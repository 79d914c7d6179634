// Rows on the host, walked once: parameter and moments are read and written together.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "step/host_sketch.h"

namespace {

const i64 AHEAD = 768;  // elements
const i64 SCRATCH = 6;  // stretches

// ---- the innermost loop: one stretch of one row ------------------------------------------------------

// What the second moment is estimated from while a row is walked. With COVER (dense rows) and COVER_ROW
// (sparse rows), both SM3-II, the walk also finds the new accumulators. LOWER and ROW (SM3-I) and OUTER
// (factored) were fed before; a SKETCH is fed at the same stretch, just before.
enum Source { NOTHING, FULL, COVER, COVER_ROW, LOWER, ROW, OUTER, SKETCH };

struct Stretch {
    float *m;          // first moment; of a sketch: what the update takes for it
    float *v;          // full second moment; of a sketch: what the update takes for it
    const float *col;  // cover; of OUTER: relative to the mean
    u32 *col_max;
    float row;
    u32 row_max;
    i64 ahead;  // how far ahead to ask for parameter and gradient, in elements
};

constexpr int second_kind_of(int source) {
    switch (source) {
        case NOTHING: return SECOND_NONE;
        case FULL: return SECOND_FULL;
        case COVER:
        case COVER_ROW: return SECOND_COVER;
        case LOWER:
        case ROW: return SECOND_COVER_I;
        default: return SECOND_FACTORED;  // the estimate is the moment
    }
}

// F: FirstKind; S: Source. Every pair has a loop of its own, which g++ vectorises. Beside a sketch, g is
// oriented already.
template <int F, int S>
FN void walk(float *__restrict p, const float *__restrict g, i64 length, Stretch &s, const Rule rule) {
    constexpr int SECOND = second_kind_of(S);
    constexpr bool IS_ORIENTED = F == FIRST_SKETCH || S == SKETCH;
    float *__restrict m = s.m, *__restrict v = s.v;
    const float *__restrict col = s.col;
    u32 *__restrict col_max = s.col_max;
    const float row = s.row;
    u32 row_max = 0;
    for (i64 start = 0; start < length; start += 64) {
        const i64 stop = start + 64 < length ? start + 64 : length;
        for (i64 j = start + s.ahead; j < stop + s.ahead; j += 16) {  // farther than the processor would
            __builtin_prefetch(p + j, 1);
            __builtin_prefetch(g + j);
        }
#pragma omp simd reduction(max : row_max)
        for (i64 j = start; j < stop; j++) {
            float estimate = row, nu = 0.0f;
            if (S == COVER || S == LOWER) estimate = smaller(row, col[j]);
            if (S == OUTER) estimate = row * col[j];
            if (S == SKETCH) estimate = v[j];
            const EntryState state = {m, v, j, F == FIRST_SKETCH ? m[j] : 0.0f, estimate};
            const float gradient = IS_ORIENTED ? g[j] : oriented(g[j], p[j], rule);
            p[j] = step_entry(F, SECOND, p[j], gradient, state, rule, nu);
            if (S == COVER || S == COVER_ROW) {
                const u32 bits = magnitude_bits(nu);
                row_max = larger_bits(row_max, bits);
                col_max[j] = larger_bits(col_max[j], bits);
            }
        }
    }
    s.row_max = row_max;
}

// ---- rows ----------------------------------------------------------------------------------------------

struct Fed {  // the sketches' block at hand; null where there is none
    Block *first, *second;
};

// Prefetch a stretch that will be written soon.
template <class T> void fetch(const T *x, i64 length) {
    for (const char *byte = (const char *)x, *end = (const char *)(x + length); byte < end; byte += 64)
        __builtin_prefetch(byte, 1);
}

template <class T> void widen_all(const T *__restrict x, i64 length, float *__restrict out) {
    for (i64 j = 0; j < length; j++) out[j] = widen(x[j]);
}

template <> void widen_all(const f16 *__restrict x, i64 length, float *__restrict out) {
    i64 j = 0;
#if defined(__F16C__)
    for (; j + 8 <= length; j += 8)
        _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + j))));
#endif
    for (; j < length; j++) out[j] = widen(x[j]);
}

// Feed an item's stretch to its sketches and read what the update takes from them. Returns the oriented
// gradient. `scratch` has room for `length` numbers 4 times.
template <class T, int F, int S>
const float *take_from_sketches(const Rows<T> &rows, i64 i, i64 begin, i64 length, const Fed &fed,
                                float *scratch, Stretch &s) {
    float *first = scratch + length, *second = scratch + 2 * length, *spare = scratch + 3 * length;
    const float *x = rows.oriented_in(i, begin, length, scratch);
    const Rule &rule = rows.a.rule;
    if (F == FIRST_SKETCH) fed.first->take_first(i, x, rule, s.m = first, spare);
    if (S == SKETCH) fed.second->take_second(i, x, rule, s.v = second);
    return x;
}

// Walk items i0..i1 in columns begin..begin+length. A cover's new accumulators are collected: the columns'
// in col_max, the rows' in row_max, which has one for each item. 16-bit parameters are widened and narrowed
// a row at a time. `scratch` has room for `length` numbers twice, with a sketch SCRATCH times.
template <class T, int F, int S>
void walk_rows(const HostStep &a, i64 i0, i64 i1, i64 begin, i64 length, const float *col, const Fed &fed,
               float *scratch, u32 *col_max, u32 *row_max) {
    constexpr bool IS_SKETCHED = F == FIRST_SKETCH || S == SKETCH, IS_WIDE = sizeof(T) == 4;
    const Rows<T> rows{a};
    float *wide = scratch;
    for (i64 i = i0; i < i1; i++) {
        const i64 row = rows.row(i), offset = row * a.m + begin;
        if (a.at && i + 2 < i1) {  // rows that do not follow each other in memory
            const i64 next = a.at[i + 2] * a.m + begin;
            fetch((const T *)a.param + next, length);
            if (F == FIRST_OF_GRADIENTS || F == FIRST_OF_UPDATES) fetch(a.first_values + next, length);
            if (S == FULL) fetch(a.second_values + next, length);
        }
        if (F == FIRST_SKETCH && i + 1 < i1) fed.first->fetch(i + 1);
        if (S == SKETCH && i + 1 < i1) fed.second->fetch(i + 1);
        T *p = rows.param(i) + begin;
        const T *g = rows.grad(i) + begin;
        float *wide_p = IS_WIDE ? (float *)p : wide;
        const float *wide_g = IS_WIDE ? (const float *)g : wide + length;
        Stretch s = {};
        s.ahead = !IS_WIDE ? 0 : length == a.m ? AHEAD : a.m;
        if (!IS_WIDE) widen_all(p, length, wide);
        if (!IS_WIDE && !IS_SKETCHED) widen_all(g, length, wide + length);
        if (IS_SKETCHED)
            wide_g = take_from_sketches<T, F, S>(rows, i, begin, length, fed, scratch + 2 * length, s);
        if (F == FIRST_OF_GRADIENTS || F == FIRST_OF_UPDATES) s.m = a.first_values + offset;
        if (S == FULL) s.v = a.second_values + offset;
        if (S >= COVER && S <= OUTER) s.row = a.row[row], s.col = col + begin;
        if (S == COVER || S == COVER_ROW) s.col_max = col_max + begin;
        walk<F, S>(wide_p, wide_g, length, s, a.rule);
        if (S == COVER || S == COVER_ROW) row_max[i] = larger_bits(row_max[i], s.row_max);
        if (!IS_WIDE)
            for (i64 j = 0; j < length; j++) p[j] = narrow<T>(wide_p[j]);
    }
}

typedef void (*WalkRows)(const HostStep &, i64, i64, i64, i64, const float *, const Fed &, float *, u32 *,
                         u32 *);

template <class T, int F> WalkRows choose_source(int s) {
    switch (s) {
        case FULL: return walk_rows<T, F, FULL>;
        case COVER: return walk_rows<T, F, COVER>;
        case COVER_ROW: return walk_rows<T, F, COVER_ROW>;
        case LOWER: return walk_rows<T, F, LOWER>;
        case ROW: return walk_rows<T, F, ROW>;
        case OUTER: return walk_rows<T, F, OUTER>;
        case SKETCH: return walk_rows<T, F, SKETCH>;
        default: return walk_rows<T, F, NOTHING>;
    }
}

template <class T> WalkRows choose_walk(int first, int s) {
    switch (first) {
        case FIRST_OF_GRADIENTS: return choose_source<T, FIRST_OF_GRADIENTS>(s);
        case FIRST_OF_UPDATES: return choose_source<T, FIRST_OF_UPDATES>(s);
        case FIRST_SKETCH: return choose_source<T, FIRST_SKETCH>(s);
        default: return choose_source<T, FIRST_NONE>(s);
    }
}

int source_of(const HostStep &a) {
    switch (a.second) {
        case SECOND_FULL: return FULL;
        case SECOND_COVER: return a.at ? COVER_ROW : COVER;
        case SECOND_COVER_I: return a.at ? ROW : LOWER;
        case SECOND_FACTORED: return OUTER;
        case SECOND_SKETCH: return SKETCH;
        default: return NOTHING;
    }
}

}  // namespace
