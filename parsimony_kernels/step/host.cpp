// The operations of ops.py for CPU tensors. Plain C++ with OpenMP, which runs on torch's own threads
// (see runtime/build.py); loaded through ctypes, so nothing of torch or Python is included.
//
// Memory is read and written once where the structure allows it (none, full, SM3-II, sketches). Where the
// estimate needs this step's gradients first (SM3-I, factored) the gradient is read twice.
//
// No result depends on the number of threads, and all threads calculate in the caller's mode
// (float_mode.h). Memory is allocated before the threads start, because no exception may leave them; if
// there is too little, Python raises MemoryError.
#include <omp.h>

#include <cmath>
#include <new>
#include <optional>
#include <vector>

#include "runtime/float_mode.h"
#include "step/entry_roots.h"
#include "step/host_elements.h"
#include "step/host_shared.h"
#include "step/host_walk.h"

namespace {

// ---- a step of rows --------------------------------------------------------------------------------------

// Without a sketch, the rows are divided among the threads.
template <class T> void step_by_rows(const HostStep &a, const float *col, u32 *col_max, u32 *row_max) {
    const WalkRows walk_all = choose_walk<T>(a.first, source_of(a));
    const int threads = a.k * a.m < PARALLEL_FROM ? 1 : a.threads;
    const i64 CHUNK = 32, chunks = (a.k + CHUNK - 1) / CHUNK;
    std::vector<std::vector<u32>> own(threads, std::vector<u32>(col_max ? a.m : 0, 0));
    const i64 each = sizeof(T) == 4 ? 0 : 2 * a.m;
    Aligned scratch(threads * each);
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 c = 0; c < chunks; c++) {
        const InMode mode(callers);
        const i64 end = (c + 1) * CHUNK < a.k ? (c + 1) * CHUNK : a.k;
        const int thread = omp_get_thread_num();
        walk_all(a, c * CHUNK, end, 0, a.m, col, Fed{}, scratch + thread * each, own[thread].data(),
                 row_max);
    }
    for (const std::vector<u32> &maxima : own)
        for (size_t j = 0; j < maxima.size(); j++) col_max[j] = larger_bits(col_max[j], maxima[j]);
}

// With a sketch, blocks of columns are. One thread does it all if there is a cover beside a sketched first
// moment: the rows' maxima are over all blocks.
template <class T> void step_by_columns(const HostStep &a, const Buckets *first, const Buckets *second,
                                        const float *col, u32 *col_max, u32 *row_max) {
    const WalkRows walk_all = choose_walk<T>(a.first, source_of(a));
    const int threads = col_max || a.k * a.m < PARALLEL_FROM ? 1 : a.threads;
    const i64 each = SCRATCH * block_size(a.m, threads);
    Aligned scratch(threads * each);
    by_blocks({first, second}, a.m, threads, [&](i64 begin, i64 length, Block *of_first, Block *of_second) {
        if (first && a.k == a.n) of_first->keep = a.rule.first_beta;
        walk_all(a, 0, a.k, begin, length, col, Fed{of_first, of_second},
                 scratch + omp_get_thread_num() * each, col_max, row_max);
    });
}

template <class T> void step_rows(const HostStep &a) {
    if (a.second == SECOND_COVER_I) feed_cover<T, true>(a);
    if (a.second == SECOND_FACTORED) feed_factored<T>(a);
    std::vector<float> scaled;
    if (a.second == SECOND_FACTORED) scaled = relative_columns(a.col, a.m);
    const float *col = a.second == SECOND_FACTORED ? scaled.data() : a.col;
    const bool covers = a.second == SECOND_COVER;
    std::vector<u32> col_max(covers ? a.m : 0, 0), row_max(covers ? a.k : 0, 0);
    u32 *cm = covers ? col_max.data() : nullptr, *rm = row_max.data();
    const Rule &r = a.rule;
    std::optional<Buckets> first, second;
    if (a.first == FIRST_SKETCH)  // where all rows arrive, the whole table is scaled instead
        first.emplace(a.first_sketch, a.at, a.k, false, a.k == a.n ? 0.0f : r.first_forgetting);
    if (a.second == SECOND_SKETCH) second.emplace(a.second_sketch, a.at, a.k, false, r.second_forgetting);
    if (first || second)
        step_by_columns<T>(a, first ? &*first : nullptr, second ? &*second : nullptr, col, cm, rm);
    else
        step_by_rows<T>(a, col, cm, rm);
    if (!covers) return;
    for (i64 i = 0; i < a.k; i++) a.row[a.at ? a.at[i] : i] = as_float(row_max[i]);
    for (i64 j = 0; j < a.m; j++)
        a.col[j] = as_float(a.at ? larger_bits(magnitude_bits(a.col[j]), col_max[j]) : col_max[j]);
}

// ---- the second moment alone ----------------------------------------------------------------------------

template <class T> void feed_full(const HostStep &a) {
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

// Feed a dense gradient, times the rule's sign, to a second moment. There is no weight decay, and no
// parameter is read.
template <class T> void observe(const HostStep &a) {
    if (a.second == SECOND_FULL) feed_full<T>(a);
    if (a.second == SECOND_COVER) feed_cover<T, false>(a);
    if (a.second == SECOND_COVER_I) feed_cover<T, true>(a);
    if (a.second == SECOND_FACTORED) feed_factored<T>(a);
    if (a.second != SECOND_SKETCH) return;
    const Rows<T> rows{a};
    const int threads = a.k * a.m < PARALLEL_FROM ? 1 : a.threads;
    const Buckets second(a.second_sketch, nullptr, a.k, false, a.rule.second_forgetting);
    const i64 each = 2 * block_size(a.m, threads);
    Aligned scratch(threads * each);
    by_blocks({nullptr, &second}, a.m, threads, [&](i64 begin, i64 length, Block *, Block *block) {
        float *x = scratch + omp_get_thread_num() * each;
        for (i64 i = 0; i < a.k; i++) {
            rows.read(i, begin, length, x);
            block->take_second(i, x, a.rule, x + length);
        }
    });
}

}  // namespace

// ---- what ctypes calls -----------------------------------------------------------------------------------

extern "C" {

// Each returns 0, or 1 if there was not enough memory.
int parsimony_step(const HostStep *a) try {
    if (a->storage == STORAGE_FLOAT32) step_rows<float>(*a);
    if (a->storage == STORAGE_BFLOAT16) step_rows<bf16>(*a);
    if (a->storage == STORAGE_FLOAT16) step_rows<f16>(*a);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

int parsimony_observe(const HostStep *a) try {
    if (a->storage == STORAGE_FLOAT32) observe<float>(*a);
    if (a->storage == STORAGE_BFLOAT16) observe<bf16>(*a);
    if (a->storage == STORAGE_FLOAT16) observe<f16>(*a);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

int parsimony_step_elements(const HostStep *a) try {
    if (a->storage == STORAGE_FLOAT32) step_elements<float>(*a);
    if (a->storage == STORAGE_BFLOAT16) step_elements<bf16>(*a);
    if (a->storage == STORAGE_FLOAT16) step_elements<f16>(*a);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

// Of steps of any kind: the number of the first whose rows, or elements, are not ascending, unique and in
// range; -1 if there is none.
int parsimony_wrong_positions(const HostStep *const *steps, i64 count) {
    for (i64 i = 0; i < count; i++) {
        const HostStep &s = *steps[i];
        const i64 bound = s.is_elements ? s.n * s.m : s.n;
        for (i64 j = 0, before = -1; s.at && j < s.k; before = s.at[j++])
            if (s.at[j] <= before || s.at[j] >= bound) return (int)i;
    }
    return -1;
}

// Such steps, one after another, and one more in each one's number of steps.
int parsimony_step_all(HostStep *const *steps, i64 count, int threads) {
    for (i64 i = 0; i < count; i++) {
        HostStep *s = steps[i];
        s->threads = threads;
        if (s->k && (s->is_elements ? parsimony_step_elements(s) : parsimony_step(s))) return 1;
        *s->num_steps += 1.0f;
    }
    return 0;
}

// Insert gain x - forgetting query.
int parsimony_sketch_update(const Sketch *table, const i64 *rows, const float *x, i64 k, float gain,
                            float forgetting, int threads) try {
    const i64 dim = table->dim;
    const Buckets buckets(*table, rows, k, false, forgetting);
    if (k * dim < PARALLEL_FROM) threads = 1;
    by_blocks({nullptr, &buckets}, dim, threads, [&](i64 begin, i64 length, Block *, Block *block) {
        for (i64 i = 0; i < k; i++) block->feed_item(i, x + i * dim + begin, gain);
    });
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

void parsimony_sqrt(float *x, i64 n, int threads) {
    const ModeBits callers = current_mode();
#pragma omp parallel num_threads(threads) if (threads > 1 && n >= PARALLEL_FROM)
    {
        const InMode mode(callers);
#pragma omp for schedule(static)
        for (i64 i = 0; i < n; i++) x[i] = sqrtf(x[i]);
    }
}

void parsimony_roots(const Rootings *r) {
    i64 begin = 0;
    for (i64 n = 0; n < r->count; begin = r->rootings[n++].end) {
        const Rooting &of = r->rootings[n];
        const float mean = of.kind == SECOND_FACTORED ? mean_of_columns(of.col, of.dim) : 0.0f;
        for (i64 j = begin; j < of.end; j++) r->roots[j] = root_at(of, r->positions[j] - of.first, mean);
    }
}

// Of k rows, in all columns; or of k elements, whose positions are in the flattened (rows, dim).
void parsimony_sketch_query(const Sketch *table, const i64 *positions, float *out, i64 k, int is_elements,
                            int threads) {
    const i64 dim = table->dim, columns = is_elements ? 1 : dim;
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && k * columns >= PARALLEL_FROM)
    for (i64 i = 0; i < k; i++) {
        const InMode mode(callers);
        const i64 row = is_elements ? positions[i] / dim : positions[i];
        const i64 column = is_elements ? positions[i] - row * dim : 0;
        Places at;
        float sign[MAX_DEPTH];
        for (i64 j = 0; j < table->depth; j++) {
            u32 hash = hash_row(row, table->seeds[j]);
            i64 bucket = j * table->width + bucket_of(hash, table->width);
            at.cells[j] = table->values + bucket * dim + column;
            sign[j] = sign_of(hash);
        }
        at.sign = sign;
        estimates[table->depth - 1][table->is_signed](at, columns, out + i * columns);
    }
}
}
