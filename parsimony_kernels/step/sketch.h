// Sketches of rows: where a row's buckets are, and what is read from and kept in them.
#pragma once

#include "runtime/arithmetic.h"
#include "step/entry.h"

// ---- the hash ------------------------------------------------------------------------------------

// The low bit is the sign, the high bits choose the bucket: see bucket_of and sign_of.
FN u32 hash_row(i64 row, i64 seed) {
    return mix(mix((u32)row ^ (u32)(u64)seed) ^ (u32)((u64)seed >> 32));
}

FN i64 bucket_of(u32 hash, i64 width) { return (i64)(((u64)hash * (u64)width) >> 32); }

FN float sign_of(u32 hash) { return (hash & 1) ? -1.0f : 1.0f; }

// ---- estimates from a sketch's `depth` buckets -----------------------------------------------------

FN void order(float &a, float &b) {
    float low = lesser(a, b);
    b = greater(a, b);
    a = low;
}

template <int DEPTH> FN float minimum_of(const float *x) {
    float least = x[0];
    for (int j = 1; j < DEPTH; j++) least = smaller(x[j], least);
    return least;
}

// Of numbers; an even depth takes the mean of the two in the middle.
template <int DEPTH> FN float middle_of(const float *x) {
    if (DEPTH == 1) return x[0];
    if (DEPTH == 2) return (x[0] + x[1]) * 0.5f;
    float a = x[0], b = x[1], c = x[2];
    if (DEPTH == 3) {
        order(a, b);
        return greater(a, lesser(b, c));
    }
    float d = x[DEPTH > 3 ? 3 : 0];
    order(a, b);
    order(c, d);
    float low = greater(a, c), high = lesser(b, d);  // of four, the two in the middle
    if (DEPTH == 4) return (low + high) * 0.5f;
    float e = x[DEPTH > 4 ? 4 : 0];
    order(low, high);
    return greater(low, lesser(high, e));
}

// NaN if one of them is.
template <int DEPTH> FN float median_of(const float *x) {
    float median = middle_of<DEPTH>(x);
    for (int j = 0; j < DEPTH; j++) median = or_nan(median, x[j]);
    return median;
}

// ---- first moments in a count-sketch ---------------------------------------------------------------

// What an entry's own gradient weighs in its first moment in the long run: 1 in an average,
// 1 / (1 - momentum) in a momentum.
FN float own_weight(const Rule &r) {
    return r.first_forgetting != 0.0f ? r.first_gain / r.first_forgetting : r.first_gain;
}

// The mean of the estimates of an entry's DEPTH buckets, and how far to doubt it. Estimates that are equal
// are taken as they are.
template <int DEPTH> FN float mean_of(const float *x, const Rule &r, float &doubt) {
    const float PER_MEAN = 1.0f / DEPTH, PER_ERROR = DEPTH > 1 ? 1.0f / (DEPTH * (DEPTH - 1)) : 0.0f;
    float mean = DEPTH > 1 ? x[DEPTH > 1 ? 1 : 0] - x[0] : 0.0f;
    for (int j = 2; j < DEPTH; j++) mean += x[j] - x[0];
    mean = x[0] + mean * PER_MEAN;
    float squares = (x[0] - mean) * (x[0] - mean);
    for (int j = 1; j < DEPTH; j++) squares += (x[j] - mean) * (x[j] - mean);
    doubt = squares * PER_ERROR * r.first_doubt;
    return mean;
}

// What the update takes for a first moment in a count-sketch whose estimates before this step have this
// mean: the moment that follows from it, as far as the estimates agree, and for the rest the entry's own
// gradient. NaN if one of them is not finite.
FN float moment_after(float mean, float doubt, float g, float weight, const Rule &r) {
    float square = mean * mean, known = 1.0f - doubt / square;
    known = known > 0.0f ? known : 0.0f;
    known = square > 0.0f ? known : doubt > 0.0f ? 0.0f : 1.0f;
    float moment = average_first(mean, g, r) * r.first_scale;
    return known * moment + (1.0f - known) * (g * weight);
}

template <int DEPTH> FN float sketched_first(const float *x, float g, float weight, const Rule &r) {
    float doubt, mean = mean_of<DEPTH>(x, r, doubt);
    return moment_after(mean, doubt, g, weight, r);
}

// ---- forgetting ------------------------------------------------------------------------------------

// How much of its rows' estimates a bucket gives up at once. `count` rows share it in this step: beyond
// 1 / count a count-min bucket would give up more than it holds, beyond 2 / count a count-sketch's would
// overshoot 0 by more than it held, and grow without end.
FN float bounded_forgetting(float forgetting, i64 count, int is_signed) {
    float most = is_signed ? 2.0f : 1.0f;
    return forgetting * (float)count <= most ? forgetting : most / (float)count;
}
