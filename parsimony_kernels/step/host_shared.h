// Second moments on the host that rows and columns share: covers and factored means. They are fed here
// where their estimates need this step's gradients first, before the rows are walked.
#pragma once

#include <omp.h>

#include <limits>
#include <vector>

#include "runtime/float_mode.h"
#include "step/host_rows.h"

namespace {

// A cover's accumulators, from the largest squares of their slices (SM3-I) or the largest estimates
// (SM3-II, of all rows). Each thread finds the maxima of its rows; which rows those are does not matter to
// the maximum of all threads' maxima.
template <class T, bool FIRST_VARIANT> void feed_cover(const HostStep &a) {
    const Rows<T> rows{a};
    const Rule r = a.rule;
    const int threads = a.k * a.m < PARALLEL_FROM ? 1 : a.threads;
    std::vector<std::vector<float>> squares(threads, std::vector<float>(a.m));
    std::vector<std::vector<u32>> own(threads, std::vector<u32>(a.m, 0));
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 i = 0; i < a.k; i++) {
        const InMode mode(callers);
        float *__restrict x = squares[omp_get_thread_num()].data();
        u32 *__restrict col_max = own[omp_get_thread_num()].data();
        rows.read_squares(i, x);
        float &row = a.row[rows.row(i)];
        const float old = row, *__restrict col = a.col;
        u32 row_max = 0;
#pragma omp simd reduction(max : row_max)
        for (i64 j = 0; j < a.m; j++) {
            float prior = r.second_beta * smaller(old, col[j]);
            u32 bits = magnitude_bits(FIRST_VARIANT ? x[j] : prior + x[j]);
            row_max = larger_bits(row_max, bits);
            col_max[j] = larger_bits(col_max[j], bits);
        }
        row = FIRST_VARIANT ? old * r.second_beta + as_float(row_max) : as_float(row_max);
    }
    for (i64 j = 0; j < a.m; j++) {
        u32 largest = 0;
        for (const std::vector<u32> &maxima : own) largest = larger_bits(largest, maxima[j]);
        float raised = a.col[j] * r.second_beta + as_float(largest);
        if (!FIRST_VARIANT) a.col[j] = as_float(largest);
        else a.col[j] = a.at ? larger(a.col[j], raised) : raised;
    }
}

float mean_of_columns(const float *col, i64 m) {
    double sum = 0;
    for (i64 j = 0; j < m; j++) sum += col[j];
    return (float)(sum / (double)m);
}

// Columns as multiples of their mean.
std::vector<float> relative_columns(const float *col, i64 m) {
    const float mean = mean_of_columns(col, m);
    std::vector<float> result(m);
    for (i64 j = 0; j < m; j++) result[j] = relative(col[j], mean);
    return result;
}

// Sum a row. Stretches of 64 columns are summed in float32, in 16 lanes, and their sums in double. If a
// lane overflows, all is summed again in double.
double sum_of(const float *x, i64 length) {
    double total = 0;
    i64 j = 0;
    for (; j + 64 <= length; j += 64) {
        float lane[16];
        for (int l = 0; l < 16; l++) lane[l] = (x[j + l] + x[j + 16 + l]) + (x[j + 32 + l] + x[j + 48 + l]);
        float half[8];
        for (int l = 0; l < 8; l++) half[l] = lane[l] + lane[l + 8];
        total += (double)((half[0] + half[4]) + (half[1] + half[5])) +
                 (double)((half[2] + half[6]) + (half[3] + half[7]));
    }
    for (; j < length; j++) total += x[j];
    if (total <= std::numeric_limits<double>::max()) return total;
    total = 0;
    for (j = 0; j < length; j++) total += x[j];
    return total;
}

// Bring the means of the rows and columns up to date. Groups of 32 rows are summed, each by one thread, and
// the groups' sums are added in order, so that the result does not depend on the number of threads.
template <class T> void feed_factored(const HostStep &a) {
    const i64 ROWS = 32, groups = (a.k + ROWS - 1) / ROWS, SPAN = 64;
    Rows<T> rows{a};
    const Rule &r = a.rule;
    const bool is_dense = !a.at;
    const std::vector<float> prior = is_dense ? std::vector<float>() : relative_columns(a.col, a.m);
    std::vector<double> total(a.m, 0.0);
    const int threads = a.k * a.m < PARALLEL_FROM ? 1 : a.threads;
    std::vector<std::vector<float>> squares(threads, std::vector<float>(a.m));
    const ModeBits callers = current_mode();
    for (i64 first = 0; first < groups; first += SPAN) {  // SPAN groups' sums are held at once
        const i64 last = first + SPAN < groups ? first + SPAN : groups;
        std::vector<double> partial((last - first) * a.m, 0.0);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (i64 group = first; group < last; group++) {
            const InMode mode(callers);
            std::vector<float> &x = squares[omp_get_thread_num()];
            double *__restrict sums = &partial[(group - first) * a.m];
            for (i64 i = group * ROWS; i < a.k && i < (group + 1) * ROWS; i++) {
                rows.read_squares(i, x.data());
                float &row = a.row[rows.row(i)];
                if (is_dense)
                    for (i64 j = 0; j < a.m; j++) sums[j] += x[j];
                else
                    for (i64 j = 0; j < a.m; j++)
                        sums[j] += (double)x[j] - (double)r.second_forgetting * (row * prior[j]);
                const float mean = (float)(sum_of(x.data(), a.m) / (double)a.m);
                row = row * r.second_beta + mean;
            }
        }
        for (i64 group = first; group < last; group++)
            for (i64 j = 0; j < a.m; j++) total[j] += partial[(group - first) * a.m + j];
    }
    for (i64 j = 0; j < a.m; j++) {
        const float mean = (float)(total[j] / (double)a.n);
        a.col[j] = is_dense ? a.col[j] * r.second_beta + mean : not_negative(a.col[j] + mean);
    }
}

}  // namespace
