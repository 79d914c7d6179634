// The operations of ops.py for CPU tensors. Plain C++ with OpenMP, which runs on torch's own threads
// (see build.py); loaded through ctypes, so nothing of torch or Python is included.
//
// Memory is read and written once where the structure allows it (none, full, SM3-II). Where the estimate
// needs this step's gradients first (SM3-I, factored, sketches) the gradient is read twice; a sketch is
// walked in blocks of columns, small enough that the block's part of the table stays in the cache.
// No result depends on the number of threads, which all calculate in the caller's mode (float_mode.h). What
// they need of memory is taken before they start: an exception must not leave them, and becomes a
// MemoryError in Python.
#include <omp.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <vector>

#include "runtime/arithmetic.h"
#include "runtime/float_mode.h"

namespace {

// ---- what ops.py hands over; host.py mirrors both ---------------------------------------------------

struct SketchArgs {
    float *values;  // (depth, width, dim)
    const i64 *seeds;
    i64 depth, width;
};

struct StepArgs {
    void *param;        // (n, m)
    const void *grad;   // (k, m); of elements: (k,) float32
    const i64 *at;      // (k,) rows, or flat elements; null: every row
    i64 n, m, k;
    int dtype, first, second, threads;
    float *first_values;                // full, velocity
    float *second_values;               // full
    float *row, *col;                   // cover, factored
    SketchArgs first_table, second_table;
    Rule rule;
};

const i64 PARALLEL_FROM = 1 << 15;  // elements; below, starting threads costs more than it saves
const i64 CACHED = 3 << 17;         // floats of a sketch's buckets that stay in the second-level cache
const i64 AHEAD = 768;              // elements

// Float arrays that begin where a cache line does: a vector that straddles two costs two.
struct Aligned {
    float *data;
    explicit Aligned(i64 size) : data((float *)::operator new(size * sizeof(float), std::align_val_t(64))) {}
    Aligned(Aligned &&other) : data(other.data) { other.data = nullptr; }
    Aligned(const Aligned &) = delete;
    ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
    operator float *() const { return data; }
};

inline int ordered_bits(float x) { return (int)(as_bits(x) & 0x7fffffffu); }  // of x >= 0, or NaN
inline int max_of(int a, int b) { return a > b ? a : b; }

// ---- the innermost loop: one stretch of one row ------------------------------------------------------

// Where the estimate of the second moment comes from while a row is walked. COVER also finds the new
// accumulators; LOWER, OUTER and the sketches (of depth 1 to 5) were fed before.
enum Source { NOTHING, FULL, COVER, COVER_ROW, LOWER, ROW, OUTER, SKETCH };

struct Stretch {
    float *m;               // first moment or velocity; of a sketch: what the update takes for it
    float *v;               // full second moment
    const float *cells[5];  // of a sketch: the item's buckets
    const float *col;       // cover; of OUTER: relative to the mean
    int *col_max;
    float row;
    int row_max;
    i64 ahead;  // elements, after these in memory and soon wanted
};

template <First F, int S>
void walk(float *__restrict p, const float *__restrict g, i64 length, Stretch &s, const Rule rule) {
    const int DEPTH = S >= SKETCH ? S - SKETCH + 1 : 1;
    float *__restrict m = s.m, *__restrict v = s.v;
    const float *__restrict col = s.col;
    const float *c0 = s.cells[0], *c1 = s.cells[1], *c2 = s.cells[2], *c3 = s.cells[3], *c4 = s.cells[4];
    int *__restrict col_max = s.col_max;
    const float row = s.row;
    int row_max = 0;
    for (i64 start = 0; start < length; start += 64) {
        const i64 stop = start + 64 < length ? start + 64 : length;
        for (i64 j = start + s.ahead; j < stop + s.ahead; j += 16) {  // the processor's own looks less far
            __builtin_prefetch(p + j, 1);
            __builtin_prefetch(g + j);
        }
#pragma omp simd reduction(max : row_max)
        for (i64 j = start; j < stop; j++) {
            float gj = oriented(g[j], p[j], rule), x = gj;
            if (F == FIRST_BEFORE) m[j] = average_first(m[j], gj, rule);
            if (F == FIRST_BEFORE) x = m[j] * rule.first_scale;
            if (F == FIRST_SKETCH) x = m[j];
            if (S != NOTHING) {
                float nu = row;
                if (S == FULL) nu = v[j] = average_second(v[j], gj, rule);
                if (S == LOWER) nu = smaller(row, col[j]);
                if (S == OUTER) nu = row * col[j];
                if (S == COVER || S == COVER_ROW) {
                    nu = average_second(S == COVER ? smaller(row, col[j]) : row, gj, rule);
                    int bits = ordered_bits(nu);
                    row_max = max_of(row_max, bits);
                    col_max[j] = max_of(col_max[j], bits);
                }
                if (S >= SKETCH) {  // minimum_of, written out: through an array g++ makes it half as fast
                    nu = c0[j];
                    if (DEPTH > 1) nu = smaller(c1[j], nu);
                    if (DEPTH > 2) nu = smaller(c2[j], nu);
                    if (DEPTH > 3) nu = smaller(c3[j], nu);
                    if (DEPTH > 4) nu = smaller(c4[j], nu);
                }
                x = preconditioned(x, nu, rule);
            }
            if (F == FIRST_AFTER) x = m[j] = average_first(m[j], x, rule);
            p[j] = moved(p[j], x, rule);
        }
    }
    s.row_max = row_max;
}

// ---- sketches ----------------------------------------------------------------------------------------

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

// x[c], a gradient, becomes what the update takes for its first moment.
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

// sums[j][c] += sign (gain x - rate estimate), the estimate from the buckets as they were.
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

// sums[j][c] += weight x: where nothing is given up, no estimate is needed.
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

// The buckets that k items hash to. `slot` numbers those that occur, so that a block of columns of just
// these can be copied together; an item's are slot[i * depth + j].
struct Buckets {
    SketchArgs table;
    bool is_signed, decays;
    i64 dim, k, num_slots = 0;
    std::vector<i64> address;  // of a slot: where its first column is in the table
    std::vector<int> slot;
    std::vector<float> sign, rate;

    // Rows `at` (null: 0..k-1), whole; or with `columns` > 0 elements of a tensor that is so wide.
    Buckets(const SketchArgs &t, bool is_signed_, i64 dim_, const i64 *at, i64 k_, i64 columns, float decay)
        : table(t), is_signed(is_signed_), decays(decay != 0.0f), dim(columns ? 1 : dim_), k(k_),
          slot(k * t.depth), sign(k * t.depth), rate(k * t.depth) {
        std::vector<i64> cell(k * t.depth);
        for (i64 i = 0; i < k; i++)
            for (i64 j = 0; j < t.depth; j++) {
                i64 position = at ? at[i] : i, row = columns ? position / columns : position;
                u32 hash = hash_row(row, t.seeds[j]);
                i64 bucket = j * t.width + bucket_of(hash, t.width);
                cell[i * t.depth + j] = columns ? bucket * columns + position % columns : bucket * dim;
                sign[i * t.depth + j] = sign_of(hash);
            }
        number(cell);
        share(decay);
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

    // Each item's decay, bounded where many share a bucket.
    void share(float decay) {
        std::vector<int> count(num_slots, 0);
        for (int s : slot) count[s]++;
        for (size_t i = 0; i < slot.size(); i++)
            rate[i] = bounded_decay(decay, count[slot[i]], is_signed);
    }

    // How many columns to take at once: so many that the block stays in the second-level cache, but not
    // so few that memory is read in crumbs; and each thread has a block.
    i64 block(i64 m, int threads) const {
        i64 fitting = CACHED / (num_slots > 0 ? num_slots : 1) / 16 * 16;
        fitting = fitting < 512 ? 512 : fitting;
        const i64 share = (m + 16 * threads - 1) / (16 * threads) * 16;
        return fitting < share ? fitting : share < m ? share : m;
    }
};

// A block of columns of the buckets: as they were; then, of a count-min sketch, as they are after all items
// were fed. What a step takes from a count-sketch is from before.
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
        if (!b.decays) {
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
                for (i64 c = 0; c < length; c++) kept[c] = cell[c] = not_negative(cell[c] + sum[c]);
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

// ---- statistics that are fed before the walk ----------------------------------------------------------

template <class T> struct Rows {
    const StepArgs &a;
    i64 row(i64 i) const { return a.at ? a.at[i] : i; }
    T *param(i64 i) const { return (T *)a.param + row(i) * a.m; }
    const T *grad(i64 i) const { return (const T *)a.grad + i * a.m; }

    // x[c] = the oriented gradient of columns begin.. of item i.
    void read(i64 i, i64 begin, i64 length, float *__restrict x) const {
        const T *__restrict p = param(i) + begin, *__restrict g = grad(i) + begin;
        const Rule rule = a.rule;
        if (rule.weight_decay == 0.0f)
            for (i64 c = 0; c < length; c++) x[c] = rule.sign * widen(g[c]);
        else
            for (i64 c = 0; c < length; c++) x[c] = oriented(widen(g[c]), widen(p[c]), rule);
    }

    // x[c] = what its square adds to the second moment.
    void read_squares(i64 i, float *__restrict x) const {
        read(i, 0, a.m, x);
        const Rule rule = a.rule;
        for (i64 c = 0; c < a.m; c++) x[c] = gained_square(x[c], rule);
    }
};

// A cover's accumulators, from the largest squares of their slices (SM3-I) or the largest estimates
// (SM3-II, of all rows). A maximum of the threads' maxima does not depend on which thread found which.
template <class T, bool FIRST_VARIANT> void feed_cover(const StepArgs &a) {
    const Rows<T> rows{a};
    const Rule r = a.rule;
    const int threads = a.k * a.m < PARALLEL_FROM ? 1 : a.threads;
    std::vector<std::vector<float>> squares(threads, std::vector<float>(a.m));
    std::vector<std::vector<int>> own(threads, std::vector<int>(a.m, 0));
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 i = 0; i < a.k; i++) {
        const InMode mode(callers);
        float *__restrict x = squares[omp_get_thread_num()].data();
        int *__restrict col_max = own[omp_get_thread_num()].data();
        rows.read_squares(i, x);
        float &row = a.row[rows.row(i)];
        const float old = row, *__restrict col = a.col;
        int row_max = 0;
#pragma omp simd reduction(max : row_max)
        for (i64 j = 0; j < a.m; j++) {
            float prior = r.second_beta * smaller(old, col[j]);
            int bits = ordered_bits(FIRST_VARIANT ? x[j] : prior + x[j]);
            row_max = max_of(row_max, bits);
            col_max[j] = max_of(col_max[j], bits);
        }
        row = FIRST_VARIANT ? old * r.second_beta + as_float(row_max) : as_float(row_max);
    }
    for (i64 j = 0; j < a.m; j++) {
        int largest = 0;
        for (const std::vector<int> &maxima : own) largest = max_of(largest, maxima[j]);
        float raised = a.col[j] * r.second_beta + as_float(largest);
        if (!FIRST_VARIANT) a.col[j] = as_float(largest);
        else a.col[j] = a.at ? larger(a.col[j], raised) : raised;
    }
}

// Columns as multiples of their mean.
std::vector<float> relative_columns(const float *col, i64 m) {
    double sum = 0;
    for (i64 j = 0; j < m; j++) sum += col[j];
    const float mean = (float)(sum / (double)m);
    std::vector<float> result(m);
    for (i64 j = 0; j < m; j++) result[j] = relative(col[j], mean);
    return result;
}

// Sums over stretches of 64 columns are float32, in 16 lanes; the rest of a row's sum is double. All of it
// is where a lane overflows.
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

// Rows and columns learn the means of the squares. The columns' sums are those of groups of 32 rows, each
// group by one thread, added in order: the threads do not show in the result.
template <class T> void feed_factored(const StepArgs &a) {
    const i64 GROUP = 32, groups = (a.k + GROUP - 1) / GROUP, SPAN = 64;
    Rows<T> rows{a};
    const Rule &r = a.rule;
    const bool is_dense = !a.at;
    const std::vector<float> prior = is_dense ? std::vector<float>() : relative_columns(a.col, a.m);
    std::vector<double> total(a.m, 0.0);
    const int threads = a.k * a.m < PARALLEL_FROM ? 1 : a.threads;
    std::vector<std::vector<float>> squares(threads, std::vector<float>(a.m));
    const ModeBits callers = current_mode();
    for (i64 first = 0; first < groups; first += SPAN) {  // so many partial sums are held at once
        const i64 last = first + SPAN < groups ? first + SPAN : groups;
        std::vector<double> partial((last - first) * a.m, 0.0);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (i64 group = first; group < last; group++) {
            const InMode mode(callers);
            std::vector<float> &x = squares[omp_get_thread_num()];
            double *__restrict sums = &partial[(group - first) * a.m];
            for (i64 i = group * GROUP; i < a.k && i < (group + 1) * GROUP; i++) {
                rows.read_squares(i, x.data());
                float &row = a.row[rows.row(i)];
                if (is_dense)
                    for (i64 j = 0; j < a.m; j++) sums[j] += x[j];
                else
                    for (i64 j = 0; j < a.m; j++)
                        sums[j] += (double)x[j] - (double)r.second_decay * (row * prior[j]);
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

// ---- a step of whole rows ------------------------------------------------------------------------------

struct Estimates {  // of the sketches' block at hand; null where there is none
    const Block *first, *second;
};

// Ask for a stretch that will be written soon.
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

// Walk items i0..i1 in columns begin..begin+length. col_max collects a cover's new columns, row_max (one
// for an item) its new rows. 16-bit parameters are widened a stretch at a time. `scratch`: 3 x length.
template <class T, First F, int S>
void walk_rows(const StepArgs &a, i64 i0, i64 i1, i64 begin, i64 length, const float *col,
               const Estimates &e, float *scratch, int *col_max, int *row_max) {
    Rows<T> rows{a};
    const bool is_wide = sizeof(T) == 4;
    float *m = scratch, *wide = scratch + length;
    for (i64 i = i0; i < i1; i++) {
        const i64 row = rows.row(i), offset = row * a.m + begin;
        if (a.at && i + 2 < i1) {  // rows that do not follow each other in memory
            const i64 next = a.at[i + 2] * a.m + begin;
            fetch((const T *)a.param + next, length);
            if (F == FIRST_BEFORE || F == FIRST_AFTER) fetch(a.first_values + next, length);
            if (S == FULL) fetch(a.second_values + next, length);
        }
        T *p = rows.param(i) + begin;
        const T *g = rows.grad(i) + begin;
        float *wide_p = is_wide ? (float *)p : wide;
        const float *wide_g = is_wide ? (const float *)g : wide + length;
        if (!is_wide) widen_all(p, length, wide), widen_all(g, length, wide + length);
        Stretch s = {};
        s.ahead = length == a.m && is_wide ? AHEAD : 0;
        if (F == FIRST_BEFORE || F == FIRST_AFTER) s.m = a.first_values + offset;
        if (F == FIRST_SKETCH) {
            rows.read(i, begin, length, s.m = m);
            e.first->take(i, a.rule, m);
        }
        if (S == FULL) s.v = a.second_values + offset;
        if (S >= SKETCH) e.second->find(i, s.cells);
        if (S >= COVER && S <= OUTER) s.row = a.row[row], s.col = col + begin;
        if (S == COVER || S == COVER_ROW) s.col_max = col_max + begin;
        walk<F, S>(wide_p, wide_g, length, s, a.rule);
        if (S == COVER || S == COVER_ROW) row_max[i] = max_of(row_max[i], s.row_max);
        if (!is_wide)
            for (i64 j = 0; j < length; j++) p[j] = narrow<T>(wide_p[j]);
    }
}

typedef void (*WalkRows)(const StepArgs &, i64, i64, i64, i64, const float *, const Estimates &, float *,
                         int *, int *);

template <class T, First F> WalkRows choose_source(int s) {
    switch (s) {
        case FULL: return walk_rows<T, F, FULL>;
        case COVER: return walk_rows<T, F, COVER>;
        case COVER_ROW: return walk_rows<T, F, COVER_ROW>;
        case LOWER: return walk_rows<T, F, LOWER>;
        case ROW: return walk_rows<T, F, ROW>;
        case OUTER: return walk_rows<T, F, OUTER>;
        case SKETCH: return walk_rows<T, F, SKETCH>;
        case SKETCH + 1: return walk_rows<T, F, SKETCH + 1>;
        case SKETCH + 2: return walk_rows<T, F, SKETCH + 2>;
        case SKETCH + 3: return walk_rows<T, F, SKETCH + 3>;
        case SKETCH + 4: return walk_rows<T, F, SKETCH + 4>;
        default: return walk_rows<T, F, NOTHING>;
    }
}

template <class T> WalkRows choose_walk(int first, int s) {
    switch (first) {
        case FIRST_BEFORE: return choose_source<T, FIRST_BEFORE>(s);
        case FIRST_AFTER: return choose_source<T, FIRST_AFTER>(s);
        case FIRST_SKETCH: return choose_source<T, FIRST_SKETCH>(s);
        default: return choose_source<T, FIRST_NONE>(s);
    }
}

int source_of(const StepArgs &a) {
    switch (a.second) {
        case SECOND_FULL: return FULL;
        case SECOND_COVER: return a.at ? COVER_ROW : COVER;
        case SECOND_COVER_I: return a.at ? ROW : LOWER;
        case SECOND_FACTORED: return OUTER;
        case SECOND_SKETCH: return SKETCH + (int)a.second_table.depth - 1;
        default: return NOTHING;
    }
}

// Without a sketch: threads share the rows. Each finds its own columns' maxima; a maximum of maxima does
// not depend on who found which.
template <class T> void step_by_rows(const StepArgs &a, const float *col, int *col_max, int *row_max) {
    const WalkRows walk_all = choose_walk<T>(a.first, source_of(a));
    const int threads = a.k * a.m < PARALLEL_FROM ? 1 : a.threads;
    const i64 CHUNK = 32, chunks = (a.k + CHUNK - 1) / CHUNK;
    std::vector<std::vector<int>> own(threads, std::vector<int>(col_max ? a.m : 0, 0));
    const i64 each = sizeof(T) == 4 ? 0 : 3 * a.m;
    Aligned scratch(threads * each);
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 c = 0; c < chunks; c++) {
        const InMode mode(callers);
        const i64 end = (c + 1) * CHUNK < a.k ? (c + 1) * CHUNK : a.k;
        const int thread = omp_get_thread_num();
        walk_all(a, c * CHUNK, end, 0, a.m, col, Estimates{}, scratch + thread * each, own[thread].data(),
                 row_max);
    }
    for (const std::vector<int> &maxima : own)
        for (size_t j = 0; j < maxima.size(); j++) col_max[j] = max_of(col_max[j], maxima[j]);
}

// With a sketch: threads share the blocks of columns, and each feeds and walks all items of its block; to
// feed them and no more, `walk_all` is null. A cover beside a sketched first moment has maxima of rows that
// blocks would share: one thread then.
template <class T> void step_by_columns(const StepArgs &a, const Buckets *first, const Buckets *second,
                                        WalkRows walk_all, const float *col, int *col_max, int *row_max) {
    const Rows<T> rows{a};
    const Rule rule = a.rule;
    const int threads = col_max || a.k * a.m < PARALLEL_FROM ? 1 : a.threads;
    i64 size = a.m;
    if (first) size = first->block(size, threads);
    if (second) size = second->block(size, threads);
    const i64 blocks = (a.m + size - 1) / size;
    std::vector<std::vector<Block>> all(threads);
    for (std::vector<Block> &fed : all) {
        for (const Buckets *b : {first, second})
            if (b) fed.emplace_back(*b, size);
        if (first && a.k == a.n) fed.front().keep = a.rule.first_beta;
    }
    Aligned scratch(threads * 3 * size);
    const ModeBits callers = current_mode();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const InMode mode(callers);
        float *x = scratch + omp_get_thread_num() * 3 * size;
        std::vector<Block> &fed = all[omp_get_thread_num()];
        const Estimates e{first ? &fed.front() : nullptr, second ? &fed.back() : nullptr};
#pragma omp for schedule(static)
        for (i64 block = 0; block < blocks; block++) {
            const i64 begin = block * size, length = begin + size < a.m ? size : a.m - begin;
            for (Block &f : fed) f.load(begin, length);
            for (i64 i = 0; i < a.k; i++) {
                rows.read(i, begin, length, x);
                if (first) fed.front().feed_item(i, x, a.rule.first_gain);
                if (!second) continue;
                for (i64 c = 0; c < length; c++) x[c] = gained_square(x[c], rule);
                fed.back().feed_item(i, x, 1.0f);
            }
            for (Block &f : fed) f.fold();
            if (walk_all) walk_all(a, 0, a.k, begin, length, col, e, x, col_max, row_max);
        }
    }
}

template <class T> void step_rows(const StepArgs &a) {
    if (a.second == SECOND_COVER_I) feed_cover<T, true>(a);
    if (a.second == SECOND_FACTORED) feed_factored<T>(a);
    std::vector<float> scaled;
    if (a.second == SECOND_FACTORED) scaled = relative_columns(a.col, a.m);
    const float *col = a.second == SECOND_FACTORED ? scaled.data() : a.col;
    const bool covers = a.second == SECOND_COVER;
    std::vector<int> col_max(covers ? a.m : 0, 0), row_max(covers ? a.k : 0, 0);
    int *cm = covers ? col_max.data() : nullptr, *rm = row_max.data();
    const Rule &r = a.rule;
    std::optional<Buckets> first, second;
    if (a.first == FIRST_SKETCH)  // where all rows arrive, all that it holds decays alike
        first.emplace(a.first_table, true, a.m, a.at, a.k, 0, a.k == a.n ? 0.0f : r.first_decay);
    if (a.second == SECOND_SKETCH) second.emplace(a.second_table, false, a.m, a.at, a.k, 0, r.second_decay);
    if (first || second)
        step_by_columns<T>(a, first ? &*first : nullptr, second ? &*second : nullptr,
                           choose_walk<T>(a.first, source_of(a)), col, cm, rm);
    else
        step_by_rows<T>(a, col, cm, rm);
    if (!covers) return;
    for (i64 i = 0; i < a.k; i++) a.row[a.at ? a.at[i] : i] = as_float(row_max[i]);
    for (i64 j = 0; j < a.m; j++)
        a.col[j] = as_float(a.at ? max_of(ordered_bits(a.col[j]), col_max[j]) : col_max[j]);
}

// ---- the second moment alone ----------------------------------------------------------------------------

template <class T> void feed_full(const StepArgs &a) {
    const Rule r = a.rule;
    const T *__restrict g = (const T *)a.grad;
    float *__restrict v = a.second_values;
    const i64 size = a.n * a.m, CHUNK = 1 << 12, chunks = (size + CHUNK - 1) / CHUNK;
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && size >= PARALLEL_FROM)
    for (i64 c = 0; c < chunks; c++) {
        const InMode mode(callers);
        const i64 end = (c + 1) * CHUNK < size ? (c + 1) * CHUNK : size;
        for (i64 j = c * CHUNK; j < end; j++) v[j] = average_second(v[j], r.sign * widen(g[j]), r);
    }
}

// Of a dense gradient, times the rule's sign; there is no weight decay, and no parameter is read.
template <class T> void observe(const StepArgs &a) {
    if (a.second == SECOND_FULL) feed_full<T>(a);
    if (a.second == SECOND_COVER) feed_cover<T, false>(a);
    if (a.second == SECOND_COVER_I) feed_cover<T, true>(a);
    if (a.second == SECOND_FACTORED) feed_factored<T>(a);
    if (a.second != SECOND_SKETCH) return;
    const Buckets second(a.second_table, false, a.m, nullptr, a.k, 0, a.rule.second_decay);
    step_by_columns<T>(a, nullptr, &second, nullptr, nullptr, nullptr, nullptr);
}

// ---- a step of single elements: few, so plain loops over arrays of k ------------------------------------

typedef std::vector<float> Floats;

// x, gradients or what their squares add, become what the update takes for the moment that a sketch keeps.
void feed_and_take(const StepArgs &a, bool is_first, Floats &x) {
    const Rule &r = a.rule;
    const float gain = is_first ? r.first_gain : 1.0f;
    const bool is_scaled = is_first && a.k == a.n * a.m;
    const float decay = is_scaled ? 0.0f : is_first ? r.first_decay : r.second_decay;
    const Buckets buckets(is_first ? a.first_table : a.second_table, is_first, 1, a.at, a.k, a.m, decay);
    Block block(buckets, 1);
    if (is_scaled) block.keep = r.first_beta;
    block.load(0, 1);
    for (i64 i = 0; i < a.k; i++) block.feed_item(i, &x[i], gain);
    block.fold();
    for (i64 i = 0; i < a.k; i++)
        if (is_first) block.take(i, r, &x[i]);
        else block.query(i, &x[i]);
}

// Accumulators can only rise: the elements of their slices that did not come are still below them.
void cover_elements(const StepArgs &a, const Floats &g, Floats &nu) {
    const bool is_first_variant = a.second == SECOND_COVER_I;
    Floats rows(a.k), cols(a.k);
    for (i64 e = 0; e < a.k; e++) {
        const float row = a.row[a.at[e] / a.m], col = a.col[a.at[e] % a.m];
        nu[e] = average_second(smaller(row, col), g[e], a.rule);
        rows[e] = is_first_variant ? average_second(row, g[e], a.rule) : nu[e];
        cols[e] = is_first_variant ? average_second(col, g[e], a.rule) : nu[e];
    }
    for (i64 e = 0; e < a.k; e++) {
        float &row = a.row[a.at[e] / a.m], &col = a.col[a.at[e] % a.m];
        row = as_float(max_of(ordered_bits(row), ordered_bits(rows[e])));
        col = as_float(max_of(ordered_bits(col), ordered_bits(cols[e])));
    }
    if (is_first_variant)
        for (i64 e = 0; e < a.k; e++) nu[e] = smaller(a.row[a.at[e] / a.m], a.col[a.at[e] % a.m]);
}

void factored_elements(const StepArgs &a, const Floats &g, Floats &nu) {
    const Rule &r = a.rule;
    Floats prior = relative_columns(a.col, a.m);
    std::vector<double> change(a.k), col_change(a.m, 0.0);
    for (i64 e = 0; e < a.k; e++) {
        const float old = a.row[a.at[e] / a.m] * prior[a.at[e] % a.m];
        change[e] = (double)gained_square(g[e], r) - (double)old * r.second_decay;
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
    prior = relative_columns(a.col, a.m);
    for (i64 e = 0; e < a.k; e++) nu[e] = a.row[a.at[e] / a.m] * prior[a.at[e] % a.m];
}

void second_of_elements(const StepArgs &a, const Floats &g, Floats &nu) {
    if (a.second == SECOND_FULL)
        for (i64 e = 0; e < a.k; e++) {
            float &v = a.second_values[a.at[e]];
            nu[e] = v = average_second(v, g[e], a.rule);
        }
    if (a.second == SECOND_COVER || a.second == SECOND_COVER_I) cover_elements(a, g, nu);
    if (a.second == SECOND_FACTORED) factored_elements(a, g, nu);
    if (a.second == SECOND_SKETCH) {
        for (i64 e = 0; e < a.k; e++) nu[e] = gained_square(g[e], a.rule);
        feed_and_take(a, false, nu);
    }
}

template <class T> void step_some(const StepArgs &a) {
    const Rule rule = a.rule;
    T *param = (T *)a.param;
    const float *grad = (const float *)a.grad;
    Floats g(a.k), x(a.k), nu(a.k);
    for (i64 e = 0; e < a.k; e++) x[e] = g[e] = oriented(grad[e], widen(param[a.at[e]]), rule);
    if (a.first == FIRST_SKETCH) feed_and_take(a, true, x);
    if (a.first == FIRST_BEFORE)
        for (i64 e = 0; e < a.k; e++) {
            float &m = a.first_values[a.at[e]];
            m = average_first(m, g[e], rule);
            x[e] = m * rule.first_scale;
        }
    second_of_elements(a, g, nu);
    for (i64 e = 0; e < a.k; e++) {
        T &p = param[a.at[e]];
        float update = a.second == SECOND_NONE ? x[e] : preconditioned(x[e], nu[e], rule);
        if (a.first == FIRST_AFTER) {
            float &u = a.first_values[a.at[e]];
            update = u = average_first(u, update, rule);
        }
        p = narrow<T>(moved(widen(p), update, rule));
    }
}

}  // namespace

// ---- what ctypes calls -----------------------------------------------------------------------------------

extern "C" {

// Tells whether host.py's idea of the structures is this one's.
i64 parsimony_sizes(int which) { return which ? sizeof(SketchArgs) : sizeof(StepArgs); }

// These return 0, or 1 if there was not enough memory.
int parsimony_step(const StepArgs *a) try {
    if (a->dtype == 0) step_rows<float>(*a);
    if (a->dtype == 1) step_rows<bf16>(*a);
    if (a->dtype == 2) step_rows<f16>(*a);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

int parsimony_observe(const StepArgs *a) try {
    if (a->dtype == 0) observe<float>(*a);
    if (a->dtype == 1) observe<bf16>(*a);
    if (a->dtype == 2) observe<f16>(*a);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

int parsimony_step_elements(const StepArgs *a) try {
    if (a->dtype == 0) step_some<float>(*a);
    if (a->dtype == 1) step_some<bf16>(*a);
    if (a->dtype == 2) step_some<f16>(*a);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

// Insert gain x - decay query.
int parsimony_sketch_update(const SketchArgs *table, int is_signed, i64 dim, const i64 *rows, const float *x,
                            i64 k, float gain, float decay, int threads) try {
    const Buckets buckets(*table, is_signed != 0, dim, rows, k, 0, decay);
    if (k * dim < PARALLEL_FROM) threads = 1;
    const i64 size = buckets.block(dim, threads), blocks = (dim + size - 1) / size;
    std::vector<Block> scratch;
    for (int thread = 0; thread < threads; thread++) scratch.emplace_back(buckets, size);
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 b = 0; b < blocks; b++) {
        const InMode mode(callers);
        Block &block = scratch[omp_get_thread_num()];
        const i64 begin = b * size;
        block.load(begin, begin + size < dim ? size : dim - begin);
        for (i64 i = 0; i < k; i++) block.feed_item(i, x + i * dim + begin, gain);
        block.fold();
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

void parsimony_sketch_query(const SketchArgs *table, int is_signed, i64 dim, const i64 *rows, float *out,
                            i64 k, int threads) {
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && k * dim >= PARALLEL_FROM)
    for (i64 i = 0; i < k; i++) {
        const InMode mode(callers);
        const float *cells[5];
        float sign[5];
        for (i64 j = 0; j < table->depth; j++) {
            u32 hash = hash_row(rows[i], table->seeds[j]);
            cells[j] = table->values + (j * table->width + bucket_of(hash, table->width)) * dim;
            sign[j] = sign_of(hash);
        }
        estimates[is_signed != 0][table->depth - 1](cells, sign, dim, out + i * dim);
    }
}
}
