// The operations of parsimony_kernels/step/ops.py on a GPU; parsimony_kernels/step/device.py launches these kernels. They are
// compiled together with device_buffers.cu, which includes this file.
//
// To the bit what parsimony_kernels/step/reference.py says, on every run and every GPU (Factored: close to
// rounding). Hence: compile with -fmad=false and IEEE division and roots (the defaults); no atomic
// additions. The only atomics are maxima of non-negative floats, taken on their bits as unsigned
// integers (a NaN of either sign is then above all), whose result does not depend on the order.
// Sums over rows that share a bucket are gathered: the launcher sorts the rows by bucket, stably,
// and one thread adds a bucket's rows in their order. Double sums (Factored) have a shape that
// depends on the tensor's alone.
//
// Sizes are limited by nothing but memory: 64-bit indices, and every kernel strides over its work,
// so any grid is correct; blocks must have THREADS threads (a multiple of 32, at most 1024).
//
// Two mappings. "Flat": one thread an item. "Tiles": THREADS / lanes rows by lanes * COLUMNS
// columns at a time; `lanes` neighbouring threads (a power of two up to 32) share a row, each has
// COLUMNS of its columns, `lanes` apart so that accesses coalesce whatever the alignment, in
// rows_per_thread rows.
#include "runtime/arithmetic.h"

#ifndef KERNEL  // tests/emulation has its own
#define KERNEL(NAME, ARGUMENT) \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const ARGUMENT s)
// Few enough registers for 1024 threads on a multiprocessor, whose reads then hide latency.
#define STREAMING_KERNEL(NAME, ARGUMENT) \
    extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) NAME(const ARGUMENT s)
#endif
#define FOR_EACH_TYPE(DEFINE) DEFINE(f32, float) DEFINE(bf16, bf16) DEFINE(f16, f16)

const int MAX_DEPTH = 5;
const u32 WHOLE_WARP = 0xffffffffu;

// ---- what device.py fills in; its ctypes structures have the same fields in the same order ------

struct Tiling {
    i64 num_rows, num_columns, num_tiles;
    int lanes, rows_per_thread;
};

// Rows or elements of a gradient. num_rows and dim are the parameter's.
struct Items {
    i64 num_items, num_rows, dim;
    const i64 *positions;  // of rows, or of elements in the flattened parameter; null: all rows
    void *param;           // in its own type; null where a gradient is only observed
    const void *grad;      // rows in the parameter's type; float for elements and for sketch_update
    const float *scale;    // one number, multiplies an observed gradient; null: 1
    int is_elements, is_dense;
};

struct Sketch {
    float *values;  // (depth, width, dim)
    i64 width, dim, seeds[MAX_DEPTH];
    int depth, is_signed;
};

enum Source { SOURCE_VALUES, SOURCE_GRADIENT, SOURCE_SQUARE };

// Work on one sketch. A cell is a bucket of the flattened (depth, width), or for elements a single
// number of the table. cells and order have depth * num_items entries.
struct Feeding {
    Rule rule;
    Items items;
    Tiling tiling;
    Sketch sketch;
    int source;
    float gain, decay, keep;
    i64 *cells;          // ascending, once sorted
    const i64 *order;    // which (depth, item) the sorted cells are of
    const i64 *ranks;    // how many distinct cells there are up to each
    float *fresh;        // (distinct cells, columns): new values, while the old are still read
    float *estimates;    // (num_items, dim)
};

struct Stepping {
    Rule rule;
    Items items;
    Tiling tiling;
    int first, second;
    float *first_values, *second_values;
    Sketch first_sketch, second_sketch;
    float *row, *col;            // Cover, Factored
    u32 *row_max, *col_max;      // Cover: maxima of this step, 0 before it
    float *averages;             // Cover, elements: (2, num_items), what row and col are raised to
    double *row_sums, *col_sums; // Factored: (tiles across, num_items), (tiles down, dim)
    const float *mean;           // Factored: of col
    double *changes;             // Factored, elements: (num_items,)
    const i64 *keys, *order;     // Factored, elements: sorted rows or columns, and whose they are
    float *means;                // Factored, elements: row or col,
    i64 share;                   //   and how many elements each entry is the mean of
};

// ---- places -------------------------------------------------------------------------------------

FN i64 flat_start() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
FN i64 flat_stride() { return (i64)gridDim.x * blockDim.x; }

FN i64 tiles_across(const Tiling &t) {
    i64 width = t.lanes * COLUMNS;
    return (t.num_columns + width - 1) / width;
}

// This thread's share of a tile.
struct Tile {
    i64 across, down, column, row;  // its first ones; the next are `lanes` and `slots` further
    int slots;
};

FN Tile tile_of(const Tiling &t, i64 index) {
    Tile tile;
    tile.slots = THREADS / t.lanes;
    tile.down = index / tiles_across(t);
    tile.across = index - tile.down * tiles_across(t);
    tile.column = tile.across * t.lanes * COLUMNS + threadIdx.x % t.lanes;
    tile.row = tile.down * tile.slots * t.rows_per_thread + threadIdx.x / t.lanes;
    return tile;
}

FN i64 row_of(const Items &x, i64 item) {
    if (x.is_elements) return x.positions[item] / x.dim;
    return x.positions ? x.positions[item] : item;
}

FN i64 column_of(const Items &x, i64 item, i64 row) { return x.positions[item] - row * x.dim; }

template <class T> FN float param_at(const Items &x, i64 at) {
    return widen(((const T *)x.param)[at]);
}

template <class T> FN float grad_at(const Items &x, i64 at) {
    float g = x.is_elements ? ((const float *)x.grad)[at] : widen(((const T *)x.grad)[at]);
    return x.scale ? g * *x.scale : g;
}

// The gradient as statistics see it. `source` is a place in grad, `at` one in param, which is read
// for weight decay alone: an observed gradient has none.
template <class T> FN float gradient(const Items &x, const Rule &r, i64 source, i64 at) {
    float p = r.weight_decay != 0.0f ? param_at<T>(x, at) : 0.0f;
    return oriented(grad_at<T>(x, source), p, r);
}

// ---- sketches -----------------------------------------------------------------------------------

struct Cells {
    i64 start[MAX_DEPTH];  // of the row's buckets, in the flattened table
    float sign[MAX_DEPTH];
};

FN Cells cells_of(const Sketch &k, i64 row) {
    Cells cells;
#pragma unroll
    for (int j = 0; j < MAX_DEPTH; j++) {
        if (j >= k.depth) continue;
        u32 hash = hash_row(row, k.seeds[j]);
        cells.start[j] = (j * k.width + bucket_of(hash, k.width)) * k.dim;
        cells.sign[j] = k.is_signed ? sign_of(hash) : 1.0f;
    }
    return cells;
}

template <int DEPTH> FN float estimate(const Sketch &k, const float *x) {
    return k.is_signed ? median_of<DEPTH>(x) : minimum_of<DEPTH>(x);
}

FN void read_cells(const Sketch &k, const Cells &cells, i64 column, float *x) {
#pragma unroll
    for (int j = 0; j < MAX_DEPTH; j++)
        if (j < k.depth) x[j] = k.values[cells.start[j] + column] * cells.sign[j];
}

// What the update takes for a first moment, from the table as it was before this step.
FN float take_first(const Sketch &k, const Cells &cells, i64 column, float g, const Rule &r) {
    float x[MAX_DEPTH], weight = own_weight(r);
    read_cells(k, cells, column, x);
    switch (k.depth) {
        case 1: return sketched_first<1>(x, g, weight, r);
        case 2: return sketched_first<2>(x, g, weight, r);
        case 3: return sketched_first<3>(x, g, weight, r);
        case 4: return sketched_first<4>(x, g, weight, r);
        default: return sketched_first<5>(x, g, weight, r);
    }
}

FN float query(const Sketch &k, const Cells &cells, i64 column) {
    float x[MAX_DEPTH];
    read_cells(k, cells, column, x);
    switch (k.depth) {
        case 1: return estimate<1>(k, x);
        case 2: return estimate<2>(k, x);
        case 3: return estimate<3>(k, x);
        case 4: return estimate<4>(k, x);
        default: return estimate<5>(k, x);
    }
}

// Flat over (depth, item): which cell each item falls into. No atomics; any thread order.
KERNEL(sketch_cells, Feeding) {
    const Sketch &k = s.sketch;
    for (i64 i = flat_start(); i < k.depth * s.items.num_items; i += flat_stride()) {
        i64 j = i / s.items.num_items, item = i - j * s.items.num_items;
        i64 row = row_of(s.items, item);
        i64 bucket = j * k.width + bucket_of(hash_row(row, k.seeds[j]), k.width);
        s.cells[i] = s.items.is_elements ? bucket * k.dim + column_of(s.items, item, row) : bucket;
    }
}

// Tiles of (num_items, dim). No atomics; any thread order.
KERNEL(sketch_query, Feeding) {
    for (i64 index = blockIdx.x; index < s.tiling.num_tiles; index += gridDim.x) {
        Tile tile = tile_of(s.tiling, index);
        for (int i = 0; i < s.tiling.rows_per_thread; i++, tile.row += tile.slots) {
            if (tile.row >= s.tiling.num_rows) break;
            Cells cells = cells_of(s.sketch, row_of(s.items, tile.row));
            for (int v = 0; v < COLUMNS; v++) {
                i64 column = tile.column + v * s.tiling.lanes;
                if (column >= s.tiling.num_columns) break;
                s.estimates[tile.row * s.sketch.dim + column] = query(s.sketch, cells, column);
            }
        }
    }
}

FN bool is_first_of_cell(const i64 *cells, i64 i) { return i == 0 || cells[i - 1] != cells[i]; }

// What an item adds, for one column, times the gain: the values, the gradient or its square.
template <class T> FN float fed_value(const Feeding &s, i64 item, i64 row, i64 column) {
    const Items &x = s.items;
    i64 source = x.is_elements ? item : item * x.dim + column;
    if (s.source == SOURCE_VALUES) return ((const float *)x.grad)[source] * s.gain;
    i64 at = x.is_elements ? x.positions[item] : row * x.dim + column;
    float g = gradient<T>(x, s.rule, source, at);
    return s.source == SOURCE_SQUARE ? g * s.gain * g : g * s.gain;
}

// The sums of gain x - rate estimate over the items of entries [begin, end), which share a cell.
template <class T>
FN void sum_of_cell(const Feeding &s, i64 begin, i64 end, i64 first_column, float *sums) {
    const Sketch &k = s.sketch;
    i64 j = s.order[begin] / s.items.num_items;
    float rate = bounded_decay(s.decay, end - begin, k.is_signed);
    for (i64 i = begin; i < end; i++) {
        i64 item = s.order[i] - j * s.items.num_items, row = row_of(s.items, item);
        Cells cells = cells_of(k, row);
        float sign = k.is_signed ? sign_of(hash_row(row, k.seeds[j])) : 1.0f;
        for (int v = 0; v < COLUMNS; v++) {
            i64 column = first_column + v * s.tiling.lanes;
            if (column >= s.tiling.num_columns) break;
            if (s.items.is_elements) column = column_of(s.items, item, row);
            float old = s.decay != 0.0f ? query(k, cells, column) : 0.0f;
            sums[v] += (fed_value<T>(s, item, row, column) - old * rate) * sign;
        }
    }
}

// Tiles of (depth * num_items, dim), or for elements (depth * num_items, 1), over the sorted cells:
// the thread at a cell's first entry adds all of its items in their order; the others have nothing
// to do. Where estimates are needed every item's `depth` buckets are read once for each of them.
// They are read from the table as it was, so new values go to `fresh`; where nothing more is read
// from that, straight into the table. No atomics; any thread order.
template <class T> FN void sketch_update(const Feeding &s) {
    i64 num_entries = s.tiling.num_rows, num_columns = s.tiling.num_columns;
    for (i64 index = blockIdx.x; index < s.tiling.num_tiles; index += gridDim.x) {
        Tile tile = tile_of(s.tiling, index);
        for (int n = 0; n < s.tiling.rows_per_thread; n++, tile.row += tile.slots) {
            i64 begin = tile.row, end = begin + 1;
            if (begin >= num_entries) break;
            if (!is_first_of_cell(s.cells, begin)) continue;
            while (end < num_entries && s.cells[end] == s.cells[begin]) end++;
            float sums[COLUMNS] = {};
            sum_of_cell<T>(s, begin, end, tile.column, sums);
            for (int v = 0; v < COLUMNS; v++) {
                i64 column = tile.column + v * s.tiling.lanes;
                if (column >= num_columns) break;
                i64 cell = s.cells[begin] * num_columns + column;
                float value = s.keep * s.sketch.values[cell] + sums[v];
                if (!s.sketch.is_signed) value = not_negative(value);
                if (s.fresh) s.fresh[(s.ranks[begin] - 1) * num_columns + column] = value;
                else s.sketch.values[cell] = value;
            }
        }
    }
}

#define DEFINE(NAME, T) \
    KERNEL(sketch_update_##NAME, Feeding) { sketch_update<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

// The same tiles as sketch_update: moves `fresh` into the table. No atomics; any thread order.
KERNEL(sketch_store, Feeding) {
    i64 num_columns = s.tiling.num_columns;
    for (i64 index = blockIdx.x; index < s.tiling.num_tiles; index += gridDim.x) {
        Tile tile = tile_of(s.tiling, index);
        for (int n = 0; n < s.tiling.rows_per_thread; n++, tile.row += tile.slots) {
            if (tile.row >= s.tiling.num_rows) break;
            if (!is_first_of_cell(s.cells, tile.row)) continue;
            i64 target = s.cells[tile.row] * num_columns;
            i64 source = (s.ranks[tile.row] - 1) * num_columns;
            for (int v = 0; v < COLUMNS; v++) {
                i64 column = tile.column + v * s.tiling.lanes;
                if (column >= num_columns) break;
                s.sketch.values[target + column] = s.fresh[source + column];
            }
        }
    }
}

// ---- one entry's step ---------------------------------------------------------------------------

// Where an entry is, and what its row and column hold; a kind of state that needs none ignores
// them.
struct Place {
    i64 column, at;
    float row_value, col_value;
};

// The second moment after this step; Full's is stored here, the others' by other kernels.
FN float second_moment(const Stepping &s, int kind, const Place &q, const Cells &cells, float g) {
    bool is_alone = !s.items.is_elements && !s.items.is_dense;  // sparse rows: no columns
    float low = is_alone ? q.row_value : smaller(q.row_value, q.col_value);
    switch (kind) {
        case SECOND_FULL:
            return s.second_values[q.at] = average_second(s.second_values[q.at], g, s.rule);
        case SECOND_COVER: return average_second(low, g, s.rule);
        case SECOND_COVER_I: return low;
        case SECOND_FACTORED: return q.row_value * relative(q.col_value, *s.mean);
        default: return query(s.second_sketch, cells, q.column);
    }
}

// Return the new parameter; `nu` becomes the second moment, which is of this kind.
FN float stepped(const Stepping &s, int kind, const Place &q, const Cells &first,
                 const Cells &second, float p, float grad, float &nu) {
    float g = oriented(grad, p, s.rule), m = g;
    if (s.first == FIRST_BEFORE) {
        m = s.first_values[q.at] = average_first(s.first_values[q.at], g, s.rule);
        m *= s.rule.first_scale;
    } else if (s.first == FIRST_SKETCH) {
        m = take_first(s.first_sketch, first, q.column, g, s.rule);
    }
    if (kind != SECOND_NONE) {
        nu = second_moment(s, kind, q, second, g);
        m = preconditioned(m, nu, s.rule);
    }
    if (s.first == FIRST_AFTER)
        m = s.first_values[q.at] = average_first(s.first_values[q.at], m, s.rule);
    return moved(p, m, s.rule);
}

// ---- steps of rows ------------------------------------------------------------------------------

// A block's own memory; in plain functions, as the emulation cannot place what templates declare.
FN u32 *shared_maxima() {
    __shared__ u32 maxima[32 * COLUMNS];
    return maxima;
}

FN double *shared_sums() {
    __shared__ double sums[THREADS * COLUMNS];
    return sums;
}

FN u32 larger_bits(u32 a, u32 b) { return a > b ? a : b; }

FN u32 max_over_lanes(u32 x, int lanes) {
    for (int apart = lanes / 2; apart > 0; apart /= 2)
        x = larger_bits(x, __shfl_xor_sync(WHOLE_WARP, x, apart));
    return x;
}

// Raise col_max by a tile's maxima; all of the block's threads must come here together. `block_max`
// is shared and all 0, before and after.
FN void raise_columns(const Stepping &s, i64 tile_across, const u32 *column_max, u32 *block_max) {
    int lanes = s.tiling.lanes, width = lanes * COLUMNS;
    for (int v = 0; v < COLUMNS; v++)
        atomicMax(&block_max[threadIdx.x % lanes + v * lanes], column_max[v]);
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS) {
        i64 column = tile_across * width + i;
        if (column < s.items.dim) atomicMax(&s.col_max[column], block_max[i]);
        block_max[i] = 0;
    }
    __syncthreads();
}

// One row's part of a tile. Everything is read before anything is written, so that the reads of all
// columns are under way together. Returns the row's maximum in these columns.
template <class T, bool IS_COVER, bool IS_SKETCHED>
FN u32 step_row(const Stepping &s, const Tile &tile, const float *col_values, u32 *column_max) {
    const Items &x = s.items;
    i64 row = row_of(x, tile.row);
    float p[COLUMNS], grad[COLUMNS];
#pragma unroll
    for (int v = 0; v < COLUMNS; v++) {
        i64 column = tile.column + v * s.tiling.lanes;
        if (column >= x.dim) continue;
        p[v] = param_at<T>(x, row * x.dim + column);
        grad[v] = widen(((const T *)x.grad)[tile.row * x.dim + column]);
    }
    Cells first = {}, second = {};
    if (IS_SKETCHED && s.first == FIRST_SKETCH) first = cells_of(s.first_sketch, row);
    if (IS_SKETCHED && s.second == SECOND_SKETCH) second = cells_of(s.second_sketch, row);
    float row_value = s.row ? s.row[row] : 0.0f;
    u32 row_max = 0;
#pragma unroll
    for (int v = 0; v < COLUMNS; v++) {
        i64 column = tile.column + v * s.tiling.lanes;
        if (column >= x.dim) continue;
        Place place = {column, row * x.dim + column, row_value, col_values[v]};
        float nu = 0.0f;
        int kind = IS_COVER ? SECOND_COVER : s.second;  // known to the compiler where it matters
        float value = stepped(s, kind, place, first, second, p[v], grad[v], nu);
        ((T *)x.param)[place.at] = narrow<T>(value);
        if (IS_COVER) {
            column_max[v] = larger_bits(column_max[v], as_bits(nu));
            row_max = larger_bits(row_max, as_bits(nu));
        }
    }
    return row_max;
}

// Tiles of (num_items, dim); reads the gradient once, reads and writes the parameter and what Full
// and Velocity keep. Sketches were fed before and are only queried (a first moment's shows its old
// values: its new ones wait in `fresh`). With a Cover (variant II) the
// step's maxima go to row_max, one atomic for each row of a tile, and col_max, one for each of its
// columns. Thread order reaches no result.
template <class T, bool IS_COVER, bool IS_SKETCHED> FN void step_tiles(const Stepping &s) {
    u32 *block_max = shared_maxima();
    if (IS_COVER) {
        for (int i = threadIdx.x; i < 32 * COLUMNS; i += THREADS) block_max[i] = 0;
        __syncthreads();
    }
    for (i64 index = blockIdx.x; index < s.tiling.num_tiles; index += gridDim.x) {
        Tile tile = tile_of(s.tiling, index);
        float col_values[COLUMNS] = {};
        for (int v = 0; v < COLUMNS; v++) {
            i64 column = tile.column + v * s.tiling.lanes;
            if (s.col && column < s.items.dim) col_values[v] = s.col[column];
        }
        u32 column_max[COLUMNS] = {};
        for (int i = 0; i < s.tiling.rows_per_thread; i++, tile.row += tile.slots) {
            bool is_inside = tile.row < s.items.num_items;
            u32 row_max = 0;
            if (is_inside)
                row_max = step_row<T, IS_COVER, IS_SKETCHED>(s, tile, col_values, column_max);
            if (IS_COVER) {  // threads outside come too: a warp may hold several rows
                row_max = max_over_lanes(row_max, s.tiling.lanes);
                if (is_inside && threadIdx.x % s.tiling.lanes == 0)
                    atomicMax(&s.row_max[tile.row], row_max);
            }
        }
        if (IS_COVER) raise_columns(s, tile.across, column_max, block_max);
    }
}

// step_*: no sketch, no Cover II. step_cover_*: Cover II, no sketch; SM3 as it is mostly run.
// step_sketch_*: any first moment and any second.
#define DEFINE(NAME, T)                                                             \
    STREAMING_KERNEL(step_##NAME, Stepping) { step_tiles<T, false, false>(s); }      \
    STREAMING_KERNEL(step_cover_##NAME, Stepping) { step_tiles<T, true, false>(s); } \
    KERNEL(step_sketch_##NAME, Stepping) {                                          \
        if (s.second == SECOND_COVER) step_tiles<T, true, true>(s);                 \
        else step_tiles<T, false, true>(s);                                         \
    }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

// ---- gradients that are only observed -----------------------------------------------------------

// Flat over all elements: Full's average; the other kinds are fed as a step feeds them. No atomics.
template <class T> FN void observe_full(const Stepping &s) {
    for (i64 i = flat_start(); i < s.items.num_items * s.items.dim; i += flat_stride()) {
        float g = gradient<T>(s.items, s.rule, i, i);
        s.second_values[i] = average_second(s.second_values[i], g, s.rule);
    }
}

#define DEFINE(NAME, T) \
    KERNEL(observe_full_##NAME, Stepping) { observe_full<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

// ---- covers -------------------------------------------------------------------------------------

// What an entry's row and column take their maxima of. A step does variant II in its own pass; here
// it comes only from dense gradients that are observed.
FN float covered_square(const Stepping &s, i64 row, i64 column, float g) {
    if (s.second == SECOND_COVER_I) return gained_square(g, s.rule);
    return average_second(smaller(s.row[row], s.col[column]), g, s.rule);
}

// Tiles of (num_items, dim): the maxima of covered_square. Atomics as in step_tiles.
template <class T> FN void cover_maxima(const Stepping &s) {
    u32 *block_max = shared_maxima();
    for (int i = threadIdx.x; i < 32 * COLUMNS; i += THREADS) block_max[i] = 0;
    __syncthreads();
    for (i64 index = blockIdx.x; index < s.tiling.num_tiles; index += gridDim.x) {
        Tile tile = tile_of(s.tiling, index);
        u32 column_max[COLUMNS] = {};
        for (int i = 0; i < s.tiling.rows_per_thread; i++, tile.row += tile.slots) {
            bool is_inside = tile.row < s.items.num_items;
            i64 row = is_inside ? row_of(s.items, tile.row) : 0;
            u32 row_max = 0;
            for (int v = 0; is_inside && v < COLUMNS; v++) {
                i64 column = tile.column + v * s.tiling.lanes, dim = s.items.dim;
                if (column >= dim) break;
                float g = gradient<T>(s.items, s.rule, tile.row * dim + column, row * dim + column);
                u32 bits = as_bits(covered_square(s, row, column, g));
                column_max[v] = larger_bits(column_max[v], bits);
                row_max = larger_bits(row_max, bits);
            }
            row_max = max_over_lanes(row_max, s.tiling.lanes);
            if (is_inside && threadIdx.x % s.tiling.lanes == 0)
                atomicMax(&s.row_max[tile.row], row_max);
        }
        raise_columns(s, tile.across, column_max, block_max);
    }
}

#define DEFINE(NAME, T) \
    KERNEL(cover_maxima_##NAME, Stepping) { cover_maxima<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

FN float covered(const Stepping &s, float old, u32 max) {
    if (s.second == SECOND_COVER) return as_float(max);
    return s.rule.second_beta * old + as_float(max);
}

// Flat over num_items rows, then dim columns: the accumulators after a step of rows. No atomics.
KERNEL(cover_store, Stepping) {
    for (i64 i = flat_start(); i < s.items.num_items + s.items.dim; i += flat_stride()) {
        i64 column = i - s.items.num_items;
        if (column < 0) {
            i64 row = row_of(s.items, i);
            s.row[row] = covered(s, s.row[row], s.row_max[i]);
        } else {
            float old = s.col[column], fresh = covered(s, old, s.col_max[column]);
            s.col[column] = s.items.is_dense ? fresh : larger(old, fresh);
        }
    }
}

// Flat over elements, for variant I: what row and col are raised to. No atomics.
template <class T> FN void cover_averages(const Stepping &s) {
    for (i64 i = flat_start(); i < s.items.num_items; i += flat_stride()) {
        i64 row = row_of(s.items, i), column = column_of(s.items, i, row);
        float g = gradient<T>(s.items, s.rule, i, s.items.positions[i]);
        s.averages[i] = average_second(s.row[row], g, s.rule);
        s.averages[s.items.num_items + i] = average_second(s.col[column], g, s.rule);
    }
}

#define DEFINE(NAME, T) \
    KERNEL(cover_averages_##NAME, Stepping) { cover_averages<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

// Flat over elements: two atomic maxima for each.
KERNEL(cover_raise, Stepping) {
    for (i64 i = flat_start(); i < s.items.num_items; i += flat_stride()) {
        i64 row = row_of(s.items, i), column = column_of(s.items, i, row);
        atomicMax((u32 *)&s.row[row], as_bits(s.averages[i]));
        atomicMax((u32 *)&s.col[column], as_bits(s.averages[s.items.num_items + i]));
    }
}

// ---- factored means -----------------------------------------------------------------------------

FN double sum_over_lanes(double x, int lanes) {
    for (int apart = lanes / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, apart);
    return x;
}

// What an entry adds to its column: the square, or for sparse rows what it changes (see ops.step).
FN double column_share(const Stepping &s, float square, float row, float col) {
    if (s.items.is_dense) return (double)square;
    double estimate = (double)(row * relative(col, *s.mean));
    return (double)square - estimate * s.rule.second_decay;
}

// One row's part of a tile; returns the sum of its squares in these columns.
template <class T>
FN double factored_row(const Stepping &s, const Tile &tile, double *column_sums) {
    i64 row = row_of(s.items, tile.row), dim = s.items.dim;
    double row_sum = 0.0;
    for (int v = 0; v < COLUMNS; v++) {
        i64 column = tile.column + v * s.tiling.lanes;
        if (column >= dim) break;
        float g = gradient<T>(s.items, s.rule, tile.row * dim + column, row * dim + column);
        float square = gained_square(g, s.rule);
        row_sum += (double)square;
        column_sums[v] += column_share(s, square, s.row[row], s.col[column]);
    }
    return row_sum;
}

// Tiles of (num_items, dim): partial sums for the rows of a tile and for its columns, to row_sums
// and col_sums. No atomics; the order of every sum follows from the tiling, hence from the shape
// alone.
template <class T> FN void factored_sums(const Stepping &s) {
    double *block_sums = shared_sums();
    int lanes = s.tiling.lanes, width = lanes * COLUMNS;
    for (i64 index = blockIdx.x; index < s.tiling.num_tiles; index += gridDim.x) {
        Tile tile = tile_of(s.tiling, index);
        int slot = threadIdx.x / lanes, lane = threadIdx.x % lanes;
        double column_sums[COLUMNS] = {};
        for (int i = 0; i < s.tiling.rows_per_thread; i++, tile.row += tile.slots) {
            bool is_inside = tile.row < s.items.num_items;
            double row_sum = is_inside ? factored_row<T>(s, tile, column_sums) : 0.0;
            row_sum = sum_over_lanes(row_sum, lanes);
            if (is_inside && lane == 0)
                s.row_sums[tile.across * s.items.num_items + tile.row] = row_sum;
        }
        for (int v = 0; v < COLUMNS; v++)
            block_sums[slot * width + lane + v * lanes] = column_sums[v];
        __syncthreads();
        for (int i = threadIdx.x; i < width; i += THREADS) {
            i64 column = tile.across * width + i;
            double sum = 0.0;
            for (int k = 0; k < tile.slots; k++) sum += block_sums[k * width + i];
            if (column < s.items.dim) s.col_sums[tile.down * s.items.dim + column] = sum;
        }
        __syncthreads();
    }
}

#define DEFINE(NAME, T) \
    KERNEL(factored_sums_##NAME, Stepping) { factored_sums<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

FN double sum_of(const double *partial, i64 count, i64 stride) {
    double sum = 0.0;
    for (i64 i = 0; i < count; i++) sum += partial[i * stride];
    return sum;
}

FN float average_mean(const Stepping &s, float old, double mean) {
    return s.rule.second_beta * old + (float)mean;
}

// Flat over num_items rows, then dim columns: the means after a step of rows. No atomics.
KERNEL(factored_store, Stepping) {
    const Items &x = s.items;
    i64 across = tiles_across(s.tiling), down = s.tiling.num_tiles / across;
    for (i64 i = flat_start(); i < x.num_items + x.dim; i += flat_stride()) {
        i64 column = i - x.num_items;
        if (column < 0) {
            i64 row = row_of(x, i);
            double sum = sum_of(s.row_sums + i, across, x.num_items);
            s.row[row] = average_mean(s, s.row[row], sum / x.dim);
        } else {
            double mean = sum_of(s.col_sums + column, down, x.dim) / x.num_rows;
            float old = s.col[column];
            s.col[column] =
                x.is_dense ? average_mean(s, old, mean) : not_negative(old + (float)mean);
        }
    }
}

// Flat over elements: what each changes of its row's sum of squares, and its column's. No atomics.
template <class T> FN void factored_changes(const Stepping &s) {
    for (i64 i = flat_start(); i < s.items.num_items; i += flat_stride()) {
        i64 row = row_of(s.items, i), column = column_of(s.items, i, row);
        float g = gradient<T>(s.items, s.rule, i, s.items.positions[i]);
        s.changes[i] = column_share(s, gained_square(g, s.rule), s.row[row], s.col[column]);
    }
}

#define DEFINE(NAME, T) \
    KERNEL(factored_changes_##NAME, Stepping) { factored_changes<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

// Flat over elements sorted by row or by column: the thread at a key's first entry adds all changes
// of that key in order. No atomics; any thread order.
KERNEL(factored_raise, Stepping) {
    for (i64 i = flat_start(); i < s.items.num_items; i += flat_stride()) {
        if (!is_first_of_cell(s.keys, i)) continue;
        double sum = 0.0;
        for (i64 end = i; end < s.items.num_items && s.keys[end] == s.keys[i]; end++)
            sum += s.changes[s.order[end]];
        float *mean = &s.means[s.keys[i]];
        *mean = not_negative(*mean + (float)(sum / s.share));
    }
}

// ---- steps of elements --------------------------------------------------------------------------

// Flat over elements. With a Cover, reads the accumulators as they were (II) or as variant I raised
// them, and leaves in `averages` what cover_raise is to raise them to (II). No atomics.
template <class T> FN void step_elements(const Stepping &s) {
    const Items &x = s.items;
    for (i64 i = flat_start(); i < x.num_items; i += flat_stride()) {
        i64 row = row_of(x, i), column = column_of(x, i, row);
        Cells first = {}, second = {};
        if (s.first == FIRST_SKETCH) first = cells_of(s.first_sketch, row);
        if (s.second == SECOND_SKETCH) second = cells_of(s.second_sketch, row);
        float row_value = s.row ? s.row[row] : 0.0f, col_value = s.col ? s.col[column] : 0.0f;
        Place place = {column, x.positions[i], row_value, col_value};
        float nu = 0.0f, p = param_at<T>(x, place.at);
        float grad = ((const float *)x.grad)[i];
        float value = stepped(s, s.second, place, first, second, p, grad, nu);
        ((T *)x.param)[place.at] = narrow<T>(value);
        if (s.second == SECOND_COVER) s.averages[i] = s.averages[x.num_items + i] = nu;
    }
}

#define DEFINE(NAME, T) \
    KERNEL(step_elements_##NAME, Stepping) { step_elements<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
