// Sketches on the host. A sketch is walked in blocks of columns, small enough that the block's part of the
// table stays in the cache.
#pragma once

#include <cstring>
#include <vector>

#include "step/host_rows.h"
#include "step/sketch.h"

namespace {

const i64 CACHED = 3 << 17;  // floats of a sketch's buckets that stay in the second-level cache

// out[c] = estimate of one item from its buckets in `cells`.
template <int DEPTH, bool SIGNED>
void estimate(const float *const *cells, const float *sign, i64 length, float *__restrict out) {
    const float *a[DEPTH];
    float s[DEPTH];
    for (int j = 0; j < DEPTH; j++) a[j] = cells[j], s[j] = SIGNED ? sign[j] : 1.0f;
#pragma omp simd
    for (i64 c = 0; c < length; c++) {
        float x[DEPTH];
        for (int j = 0; j < DEPTH; j++) x[j] = SIGNED ? a[j][c] * s[j] : a[j][c];
        out[c] = SIGNED ? median_of<DEPTH>(x) : minimum_of<DEPTH>(x);
    }
}

// Replace x[c], a gradient, by what the update takes for its first moment.
template <int DEPTH>
void take_first(const float *const *cells, const float *sign, i64 length, const Rule rule,
                float *__restrict x) {
    const float weight = own_weight(rule);
    const float *a[DEPTH];
    float s[DEPTH];
    for (int j = 0; j < DEPTH; j++) a[j] = cells[j], s[j] = sign[j];
#pragma GCC ivdep
    for (i64 c = 0; c < length; c++) {
        float y[DEPTH];
        for (int j = 0; j < DEPTH; j++) y[j] = a[j][c] * s[j];
        x[c] = sketched_first<DEPTH>(y, x[c], weight, rule);
    }
}

// sums[j][c] += sign (gain x - rate estimate), with the estimate from the buckets as they were.
template <int DEPTH, bool SIGNED>
void feed(const float *const *cells, float *const *sums, const float *sign, const float *rate,
          const float *__restrict x, float gain, i64 length) {
    const float *a[DEPTH];
    float *b[DEPTH], s[DEPTH], r[DEPTH];
    for (int j = 0; j < DEPTH; j++)
        a[j] = cells[j], b[j] = sums[j], s[j] = SIGNED ? sign[j] : 1.0f, r[j] = rate[j];
#pragma GCC ivdep
    for (i64 c = 0; c < length; c++) {
        float y[DEPTH];
        for (int j = 0; j < DEPTH; j++) y[j] = SIGNED ? a[j][c] * s[j] : a[j][c];
        float q = SIGNED ? median_of<DEPTH>(y) : minimum_of<DEPTH>(y), gx = gain * x[c];
        for (int j = 0; j < DEPTH; j++) {
            float change = gx - r[j] * q;
            b[j][c] += SIGNED ? change * s[j] : change;
        }
    }
}

// sums[j][c] += weight x: a sketch that forgets nothing needs no estimate.
template <int DEPTH>
void insert(float *const *sums, const float *weight, const float *__restrict x, i64 length) {
    float *b[DEPTH], w[DEPTH];
    for (int j = 0; j < DEPTH; j++) b[j] = sums[j], w[j] = weight[j];
#pragma GCC ivdep
    for (i64 c = 0; c < length; c++)
        for (int j = 0; j < DEPTH; j++) b[j][c] += w[j] * x[c];
}

typedef void (*Estimate)(const float *const *, const float *, i64, float *);
typedef void (*Feed)(const float *const *, float *const *, const float *, const float *, const float *,
                     float, i64);
typedef void (*Insert)(float *const *, const float *, const float *, i64);
typedef void (*TakeFirst)(const float *const *, const float *, i64, const Rule, float *);
const TakeFirst firsts[5] = {take_first<1>, take_first<2>, take_first<3>, take_first<4>, take_first<5>};
const Insert inserts[5] = {insert<1>, insert<2>, insert<3>, insert<4>, insert<5>};
const Estimate estimates[2][5] = {
    {estimate<1, false>, estimate<2, false>, estimate<3, false>, estimate<4, false>, estimate<5, false>},
    {estimate<1, true>, estimate<2, true>, estimate<3, true>, estimate<4, true>, estimate<5, true>}};
const Feed feeds[2][5] = {{feed<1, false>, feed<2, false>, feed<3, false>, feed<4, false>, feed<5, false>},
                          {feed<1, true>, feed<2, true>, feed<3, true>, feed<4, true>, feed<5, true>}};

// The buckets that k items hash to. Those that occur are numbered by `slot`, so that a block of columns of
// just these buckets can be copied together. Item i has the buckets slot[i * depth + j].
struct Buckets {
    Sketch table;
    bool is_signed, forgets;
    i64 num_slots = 0;
    std::vector<i64> address;  // of a slot: where its first column is in the table
    std::vector<int> slot;
    std::vector<float> sign, rate;

    // Items are the rows `at` (null: 0..k-1); or, where are_elements, single elements `at`.
    Buckets(const Sketch &t, const i64 *at, i64 k, bool are_elements, float forgetting)
        : table(t), is_signed(t.is_signed != 0), forgets(forgetting != 0.0f), slot(k * t.depth),
          sign(k * t.depth), rate(k * t.depth) {
        std::vector<i64> cell(k * t.depth);
        for (i64 i = 0; i < k; i++)
            for (i64 j = 0; j < t.depth; j++) {
                i64 position = at ? at[i] : i, row = are_elements ? position / t.dim : position;
                u32 hash = hash_row(row, t.seeds[j]);
                i64 bucket = j * t.width + bucket_of(hash, t.width);
                cell[i * t.depth + j] = bucket * t.dim + (are_elements ? position % t.dim : 0);
                sign[i * t.depth + j] = sign_of(hash);
            }
        number(cell);
        bound_rates(forgetting);
    }

    // Number the cells in the order in which they occur first, through an open hash table.
    void number(const std::vector<i64> &cell) {
        size_t size = 16;
        while (size < 2 * cell.size()) size *= 2;
        std::vector<int> found(size, -1);
        for (size_t i = 0; i < cell.size(); i++) {
            size_t h = mix((u32)cell[i] ^ mix((u32)(cell[i] >> 32))) & (size - 1);
            while (found[h] >= 0 && address[found[h]] != cell[i]) h = (h + 1) & (size - 1);
            if (found[h] < 0) found[h] = (int)num_slots++, address.push_back(cell[i]);
            slot[i] = found[h];
        }
    }

    // How much each item makes its buckets forget: less where many items share a bucket.
    void bound_rates(float forgetting) {
        std::vector<int> count(num_slots, 0);
        for (int s : slot) count[s]++;
        for (size_t i = 0; i < slot.size(); i++)
            rate[i] = bounded_forgetting(forgetting, count[slot[i]], is_signed);
    }

    // How many of m columns to take at once: few enough that the block stays in the second-level cache and
    // that each thread has a block, but not so few that reading memory is slow.
    i64 block(i64 m, int threads) const {
        i64 fitting = CACHED / (num_slots > 0 ? num_slots : 1) / 16 * 16;
        fitting = fitting < 512 ? 512 : fitting;
        const i64 each = (m + 16 * threads - 1) / (16 * threads) * 16;
        return fitting < each ? fitting : each < m ? each : m;
    }
};

// A block of columns of the buckets. After `fold` the table has what all items have inserted. `cells` stay
// as they were, as a step takes its moments from the sketch before the step.
struct Block {
    const Buckets &b;
    i64 begin = 0, length = 0;
    float keep = 1.0f;  // what the cells are scaled by as the sums are added
    Aligned cells, sums;

    Block(const Buckets &b_, i64 size) : b(b_), cells(b.num_slots * size), sums(b.num_slots * size) {}

    void load(i64 begin_, i64 length_) {
        begin = begin_, length = length_;
        for (i64 s = 0; s < b.num_slots; s++)
            memcpy(&cells[s * length], b.table.values + b.address[s] + begin, length * sizeof(float));
        memset(sums, 0, b.num_slots * length * sizeof(float));
    }

    void find(i64 i, const float **at) const {
        for (i64 j = 0; j < b.table.depth; j++) at[j] = &cells[b.slot[i * b.table.depth + j] * length];
    }

    void feed_item(i64 i, const float *x, float gain) {
        const i64 depth = b.table.depth;
        const float *from[5];
        float *to[5];
        find(i, from);
        for (i64 j = 0; j < depth; j++) to[j] = &sums[b.slot[i * depth + j] * length];
        if (!b.forgets) {
            float weight[5];
            for (i64 j = 0; j < depth; j++) weight[j] = b.is_signed ? gain * b.sign[i * depth + j] : gain;
            inserts[depth - 1](to, weight, x, length);
            return;
        }
        feeds[b.is_signed][depth - 1](from, to, &b.sign[i * depth], &b.rate[i * depth], x, gain, length);
    }

    void fold() {
        for (i64 s = 0; s < b.num_slots; s++) {
            float *__restrict cell = &cells[s * length], *__restrict sum = &sums[s * length];
            float *__restrict kept = b.table.values + b.address[s] + begin;
            if (b.is_signed)
                for (i64 c = 0; c < length; c++) kept[c] = keep * cell[c] + sum[c];
            else
                for (i64 c = 0; c < length; c++) kept[c] = not_negative(cell[c] + sum[c]);
        }
    }

    void query(i64 i, float *out) const {
        const float *from[5];
        find(i, from);
        estimates[b.is_signed][b.table.depth - 1](from, &b.sign[i * b.table.depth], length, out);
    }

    void take(i64 i, const Rule &rule, float *x) const {
        const float *from[5];
        find(i, from);
        firsts[b.table.depth - 1](from, &b.sign[i * b.table.depth], length, rule, x);
    }
};

}  // namespace
