// The innermost loops over a sketch's cells on the host: one stretch of one item's buckets.
//
// They are short on purpose: a loop that does everything keeps so much waiting for its root and quotients
// that the processor cannot look ahead to the next columns. What they hand on stays in the first cache.
#pragma once

#include <cmath>

#include "step/sketch.h"

namespace {

// Where a stretch of an item's buckets is. What the items insert is added up in `to`, from what the items
// before have added, which is `from`: `to` itself, or zeros. `cells` are as they were before this step.
struct Places {
    const float *cells[MAX_DEPTH], *from[MAX_DEPTH];
    float *to[MAX_DEPTH];
    const float *sign, *rate;  // one for each bucket; sign is null where there are none
};

// How the items of a step make their buckets forget: not at all, all at one rate, or at several.
enum Forgetting { NEVER, EVENLY, UNEVENLY };

// NaN if one of them is. With one test for two buckets, where minimum_of has one for each.
template <int DEPTH> FN float least_of(const float *x) {
    float least = x[0];
    for (int j = 1; j < DEPTH; j++) least = lesser(x[j], least);
    if (DEPTH > 2) least = __builtin_isunordered(x[1], x[DEPTH > 2 ? 2 : 0]) ? NAN : least;
    if (DEPTH == 2) least = or_nan(least, x[DEPTH > 1 ? 1 : 0]);
    if (DEPTH == 4) least = or_nan(least, x[DEPTH > 3 ? 3 : 0]);
    if (DEPTH == 5) least = __builtin_isunordered(x[DEPTH > 3 ? 3 : 0], x[DEPTH > 4 ? 4 : 0]) ? NAN : least;
    return least;
}

// ---- second moments: count-min -------------------------------------------------------------------------

// Feed the squares of x, which are gradients, and set nu[c] to the moment that follows from the estimate.
template <int DEPTH, int FORGETTING>
void follow(const Places &at, const float *__restrict x, i64 length, const Rule rule, float *__restrict nu) {
    const float *c[DEPTH], *a[DEPTH];
    float *b[DEPTH], rate[DEPTH];
    for (int j = 0; j < DEPTH; j++) c[j] = at.cells[j], a[j] = at.from[j], b[j] = at.to[j];
    for (int j = 0; j < DEPTH; j++) rate[j] = at.rate[FORGETTING == UNEVENLY ? j : 0];
#pragma GCC ivdep
    for (i64 i = 0; i < length; i++) {
        float y[DEPTH];
        for (int j = 0; j < DEPTH; j++) y[j] = c[j][i];
        const float q = least_of<DEPTH>(y), square = gained_square(x[i], rule);
        for (int j = 0; j < DEPTH; j++)
            b[j][i] = a[j][i] + (FORGETTING == NEVER ? square : square - rate[j] * q);
        nu[i] = rule.second_beta * q + square;
    }
}

// ---- first moments: count-sketches ---------------------------------------------------------------------

// Add gain x, with the bucket's sign.
template <int DEPTH>
void insert(const Places &at, const float *__restrict x, i64 length, float gain) {
    const float *a[DEPTH];
    float *b[DEPTH], w[DEPTH];
    for (int j = 0; j < DEPTH; j++)
        a[j] = at.from[j], b[j] = at.to[j], w[j] = at.sign ? gain * at.sign[j] : gain;
#pragma GCC ivdep
    for (i64 i = 0; i < length; i++)
        for (int j = 0; j < DEPTH; j++) b[j][i] = a[j][i] + w[j] * x[i];
}

// Add gain x - rate estimate, with the bucket's sign where the sketch is SIGNED.
template <int DEPTH, bool SIGNED>
void feed(const Places &at, const float *__restrict x, i64 length, float gain) {
    const float *c[DEPTH], *a[DEPTH];
    float *b[DEPTH], s[DEPTH], r[DEPTH];
    for (int j = 0; j < DEPTH; j++) c[j] = at.cells[j], a[j] = at.from[j], b[j] = at.to[j];
    for (int j = 0; j < DEPTH; j++) s[j] = SIGNED ? at.sign[j] : 1.0f, r[j] = at.rate[j];
#pragma GCC ivdep
    for (i64 i = 0; i < length; i++) {
        float y[DEPTH];
        for (int j = 0; j < DEPTH; j++) y[j] = SIGNED ? c[j][i] * s[j] : c[j][i];
        float q = SIGNED ? median_of<DEPTH>(y) : least_of<DEPTH>(y), gx = gain * x[i];
        for (int j = 0; j < DEPTH; j++) {
            float change = gx - r[j] * q;
            b[j][i] = a[j][i] + (SIGNED ? change * s[j] : change);
        }
    }
}

// Set m[c] to what the update takes for the first moment of x, which are gradients.
template <int DEPTH>
void take(const Places &at, const float *__restrict x, i64 length, const Rule rule, float *__restrict m,
          float *__restrict doubt) {
    const float weight = own_weight(rule);
    const float *c[DEPTH];
    float s[DEPTH];
    for (int j = 0; j < DEPTH; j++) c[j] = at.cells[j], s[j] = at.sign[j];
#pragma GCC ivdep
    for (i64 i = 0; i < length; i++) {
        float y[DEPTH];
        for (int j = 0; j < DEPTH; j++) y[j] = c[j][i] * s[j];
        m[i] = mean_of<DEPTH>(y, rule, doubt[i]);
    }
#pragma GCC ivdep
    for (i64 i = 0; i < length; i++) m[i] = moment_after(m[i], doubt[i], x[i], weight, rule);
}

// ---- queries -------------------------------------------------------------------------------------------

template <int DEPTH, bool SIGNED>
void estimate(const Places &at, i64 length, float *__restrict out) {
    const float *c[DEPTH];
    float s[DEPTH];
    for (int j = 0; j < DEPTH; j++) c[j] = at.cells[j], s[j] = SIGNED ? at.sign[j] : 1.0f;
#pragma omp simd
    for (i64 i = 0; i < length; i++) {
        float y[DEPTH];
        for (int j = 0; j < DEPTH; j++) y[j] = SIGNED ? c[j][i] * s[j] : c[j][i];
        out[i] = SIGNED ? median_of<DEPTH>(y) : least_of<DEPTH>(y);
    }
}

// ---- by depth ------------------------------------------------------------------------------------------

typedef void (*Follow)(const Places &, const float *, i64, const Rule, float *);
typedef void (*Feed)(const Places &, const float *, i64, float);
typedef void (*Take)(const Places &, const float *, i64, const Rule, float *, float *);
typedef void (*Estimate)(const Places &, i64, float *);

template <int DEPTH> struct Loops {
    static constexpr Follow follows[3] = {follow<DEPTH, NEVER>, follow<DEPTH, EVENLY>,
                                          follow<DEPTH, UNEVENLY>};
    static constexpr Feed feeds[2] = {feed<DEPTH, false>, feed<DEPTH, true>};
    static constexpr Estimate estimates[2] = {estimate<DEPTH, false>, estimate<DEPTH, true>};
};

#define BY_DEPTH(TABLE) {Loops<1>::TABLE, Loops<2>::TABLE, Loops<3>::TABLE, Loops<4>::TABLE, Loops<5>::TABLE}
const Follow *const follows[MAX_DEPTH] = BY_DEPTH(follows);
const Feed *const feeds[MAX_DEPTH] = BY_DEPTH(feeds);
const Estimate *const estimates[MAX_DEPTH] = BY_DEPTH(estimates);
#undef BY_DEPTH
const Feed inserts[MAX_DEPTH] = {insert<1>, insert<2>, insert<3>, insert<4>, insert<5>};
const Take takes[MAX_DEPTH] = {take<1>, take<2>, take<3>, take<4>, take<5>};

}  // namespace
