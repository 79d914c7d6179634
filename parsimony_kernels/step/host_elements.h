// A step of single elements on the host. They are few, so these are plain loops over arrays of k.
#pragma once

#include <vector>

#include "step/host_shared.h"
#include "step/host_sketch.h"

namespace {

typedef std::vector<float> Floats;

// Feed x, the gradients, to the sketch of a moment, and return what the update takes for the moment.
Floats taken_from_sketch(const HostStep &a, bool is_first, const Floats &x) {
    const Rule &r = a.rule;
    const bool is_scaled = is_first && a.k == a.n * a.m;
    const float forgetting = is_scaled ? 0.0f : is_first ? r.first_forgetting : r.second_forgetting;
    const Buckets buckets(is_first ? a.first_sketch : a.second_sketch, a.at, a.k, true, forgetting);
    Block block(buckets, 1);
    block.length = 1;
    if (is_scaled) block.keep = r.first_beta;
    Floats taken(a.k);
    float doubt;
    for (i64 i = 0; i < a.k; i++)
        if (is_first) block.take_first(i, &x[i], r, &taken[i], &doubt);
        else block.take_second(i, &x[i], r, &taken[i]);
    return taken;
}

float &row_of(const HostStep &a, i64 e) { return a.row[a.at[e] / a.m]; }
float &col_of(const HostStep &a, i64 e) { return a.col[a.at[e] % a.m]; }

// Raise the accumulators of each element's row and column to these. They can only rise, as the elements of
// the row and column that did not come are still below them.
void raise_covers(const HostStep &a, const Floats &rows, const Floats &cols) {
    for (i64 e = 0; e < a.k; e++) {
        float &row = row_of(a, e), &col = col_of(a, e);
        row = as_float(larger_bits(magnitude_bits(row), magnitude_bits(rows[e])));
        col = as_float(larger_bits(magnitude_bits(col), magnitude_bits(cols[e])));
    }
}

void feed_first_variant(const HostStep &a, const Floats &g) {
    Floats rows(a.k), cols(a.k);
    for (i64 e = 0; e < a.k; e++) {
        rows[e] = average_second(row_of(a, e), g[e], a.rule);
        cols[e] = average_second(col_of(a, e), g[e], a.rule);
    }
    raise_covers(a, rows, cols);
}

void feed_factored_elements(const HostStep &a, const Floats &g) {
    const Rule &r = a.rule;
    const Floats prior = relative_columns(a.col, a.m);
    std::vector<double> change(a.k), col_change(a.m, 0.0);
    for (i64 e = 0; e < a.k; e++) {
        const float old = row_of(a, e) * prior[a.at[e] % a.m];
        change[e] = (double)gained_square(g[e], r) - (double)old * r.second_forgetting;
        col_change[a.at[e] % a.m] += change[e];
    }
    for (i64 e = 0; e < a.k;) {  // ascending: a row's elements lie together
        const i64 row = a.at[e] / a.m;
        double sum = 0;
        for (; e < a.k && a.at[e] / a.m == row; e++) sum += change[e];
        a.row[row] = not_negative(a.row[row] + (float)(sum / (double)a.m));
    }
    for (i64 j = 0; j < a.m; j++)
        if (col_change[j] != 0.0) a.col[j] = not_negative(a.col[j] + (float)(col_change[j] / (double)a.n));
}

// Return the estimates that step_entry takes (EntryState), having fed what must be fed before; of a sketch,
// the moments themselves.
Floats estimates_of_second(const HostStep &a, const Floats &g) {
    Floats estimates(a.k);
    if (a.second == SECOND_COVER_I) feed_first_variant(a, g);
    if (a.second == SECOND_COVER || a.second == SECOND_COVER_I)
        for (i64 e = 0; e < a.k; e++) estimates[e] = smaller(row_of(a, e), col_of(a, e));
    if (a.second == SECOND_FACTORED) {
        feed_factored_elements(a, g);
        const Floats scaled = relative_columns(a.col, a.m);
        for (i64 e = 0; e < a.k; e++) estimates[e] = row_of(a, e) * scaled[a.at[e] % a.m];
    }
    return a.second == SECOND_SKETCH ? taken_from_sketch(a, false, g) : estimates;
}

template <class T> void step_elements(const HostStep &a) {
    const Rule rule = a.rule;
    T *param = (T *)a.param;
    const float *grad = (const float *)a.grad;
    Floats g(a.k), nu(a.k);
    for (i64 e = 0; e < a.k; e++) g[e] = oriented(grad[e], widen(param[a.at[e]]), rule);
    Floats first = g;
    if (a.first == FIRST_SKETCH) first = taken_from_sketch(a, true, g);
    const Floats estimates = estimates_of_second(a, g);
    const int second = a.second == SECOND_SKETCH ? SECOND_FACTORED : a.second;  // the estimate is the moment
    for (i64 e = 0; e < a.k; e++) {
        T &p = param[a.at[e]];
        const EntryState state = {a.first_values, a.second_values, a.at[e], first[e], estimates[e]};
        p = narrow<T>(step_entry(a.first, second, widen(p), g[e], state, rule, nu[e]));
    }
    if (a.second == SECOND_COVER) raise_covers(a, nu, nu);
}

}  // namespace
