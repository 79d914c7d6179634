// Second moments on the device that rows and columns share: covers and factored means. Double sums
// (Factored) have a shape that depends on the tensor's alone.
#pragma once

#include "step/device_tiles.h"

// ---- covers -------------------------------------------------------------------------------------

// What an entry's row and column take their maxima of. A step does variant II in its own pass; here
// it comes only from dense gradients that are observed.
FN float covered_square(const DeviceStep &s, i64 row, i64 column, float g) {
    if (s.second == SECOND_COVER_I) return gained_square(g, s.rule);
    return average_second(smaller(s.row[row], s.col[column]), g, s.rule);
}

// A tile of (num_items, dim): the maxima of covered_square. Atomics as in step_tile.
template <class T> FN void cover_maxima(const DeviceStep &s, i64 index) {
    Tile tile = tile_of(s.tiling, index);
    Part part = part_of(tile.column, s.items.dim, tile.apart, s.items.is_aligned);
    u32 column_max[COLUMNS] = {};
    for (int i = 0; i < s.tiling.rows_per_thread; i++, tile.row += tile.slots) {
        bool is_inside = tile.row < s.items.num_items;
        u32 row_max = 0;
        if (is_inside) {
            i64 row = row_of(s.items, tile.row), dim = s.items.dim;
            float g[COLUMNS] = {};
            load_gradient<T>(s.items, s.rule, tile.row * dim + tile.column, row * dim + tile.column,
                             part, g);
#pragma unroll
            for (int v = 0; v < COLUMNS; v++) {
                if (v >= part.count) continue;
                u32 bits = as_bits(covered_square(s, row, tile.column + v * tile.apart, g[v]));
                column_max[v] = larger_bits(column_max[v], bits);
                row_max = larger_bits(row_max, bits);
            }
        }
        row_max = max_over_lanes(row_max, s.tiling.lanes);
        if (is_inside && threadIdx.x % s.tiling.lanes == 0)
            atomicMax(&s.row_max[tile.row], row_max);
    }
    raise_columns(s, tile, column_max);
}

FN float covered(const DeviceStep &s, float old, u32 max) {
    if (s.second == SECOND_COVER) return as_float(max);
    return s.rule.second_beta * old + as_float(max);
}

// num_items rows, then dim columns: the accumulators after a step of rows. No atomics.
FN void cover_store_block(const DeviceStep &s, i64 block) {
    i64 i = flat_item(block), column = i - s.items.num_items;
    if (column >= s.items.dim) return;
    if (column < 0) {
        i64 row = row_of(s.items, i);
        s.row[row] = covered(s, s.row[row], s.row_max[i]);
    } else {
        float old = s.col[column], fresh = covered(s, old, s.col_max[column]);
        s.col[column] = s.items.is_dense ? fresh : larger(old, fresh);
    }
}

// Elements, for variant I: what row and col are raised to. No atomics.
template <class T> FN void cover_averages(const DeviceStep &s, i64 block) {
    i64 i = flat_item(block);
    if (i >= s.items.num_items) return;
    i64 row = row_of(s.items, i), column = column_of(s.items, i, row);
    float g = gradient<T>(s.items, s.rule, i, s.items.positions[i]);
    s.averages[i] = average_second(s.row[row], g, s.rule);
    s.averages[s.items.num_items + i] = average_second(s.col[column], g, s.rule);
}

// Elements: two atomic maxima for each.
FN void cover_raise_block(const DeviceStep &s, i64 block) {
    i64 i = flat_item(block);
    if (i >= s.items.num_items) return;
    i64 row = row_of(s.items, i), column = column_of(s.items, i, row);
    atomicMax((u32 *)&s.row[row], as_bits(s.averages[i]));
    atomicMax((u32 *)&s.col[column], as_bits(s.averages[s.items.num_items + i]));
}

#define DEFINE(NAME, T)                                 \
    BATCH_KERNEL(cover_maxima_##NAME, cover_maxima<T>)  \
    BATCH_KERNEL(cover_averages_##NAME, cover_averages<T>)
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
BATCH_KERNEL(cover_store, cover_store_block)
BATCH_KERNEL(cover_raise, cover_raise_block)

// ---- factored means -----------------------------------------------------------------------------

const int SLICES = THREADS / 32;

FN double sum_over_lanes(double x, int lanes) {
    for (int apart = lanes / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, apart);
    return x;
}

// What an entry adds to its column: the square, or for sparse rows what it changes (see ops.step).
FN double column_change(const DeviceStep &s, float square, float row, float col) {
    if (s.items.is_dense) return (double)square;
    double estimate = (double)(row * relative(col, *s.mean));
    return (double)square - estimate * s.rule.second_forgetting;
}

// One row's part of a tile; returns the sum of its squares in these columns.
template <class T>
FN double factored_row(const DeviceStep &s, const Tile &tile, const Part &part, double *column_sums) {
    i64 row = row_of(s.items, tile.row), dim = s.items.dim;
    double row_sum = 0.0;
    float g[COLUMNS] = {};
    load_gradient<T>(s.items, s.rule, tile.row * dim + tile.column, row * dim + tile.column, part, g);
#pragma unroll
    for (int v = 0; v < COLUMNS; v++) {
        if (v >= part.count) continue;
        float square = gained_square(g[v], s.rule);
        row_sum += (double)square;
        column_sums[v] +=
            column_change(s, square, s.row[row], s.col[tile.column + v * tile.apart]);
    }
    return row_sum;
}

// Rows of a thread whose squares are summed together, and threads on a multiprocessor: so much is read
// before the first is waited for.
const int SUMMED_ROWS = 4;
#define SUMMING_THREADS 1024

template <class T> struct GradientRows {
    float g[SUMMED_ROWS][COLUMNS];

    FN void read(const DeviceStep &s, i64 at, i64 further) {
        const Part part = {COLUMNS, 1, true};
#pragma unroll
        for (int k = 0; k < SUMMED_ROWS; k++) load((const T *)s.items.grad + at + k * further, part, g[k]);
    }
};

// The sums of squares of SUMMED_ROWS rows, over a warp's lanes: lanes that agree in their upper bits have
// the same row's, which is returned in `row`. Lanes exchange halves of what they have until they have one
// sum each; the order of every sum is that of sum_over_lanes.
FN double sums_over_lanes(double *sums, int &row) {
    int lane = threadIdx.x % 32, count = SUMMED_ROWS, apart = 16;
    row = 0;
#pragma unroll
    for (; count > 1; apart /= 2) {
        count /= 2;
        bool is_upper = lane & apart;
        row += is_upper ? count : 0;
#pragma unroll
        for (int k = 0; k < count; k++) {
            double kept = is_upper ? sums[k + count] : sums[k], sent = is_upper ? sums[k] : sums[k + count];
            sums[k] = kept + __shfl_xor_sync(WHOLE_WARP, sent, apart);
        }
    }
    double sum = sums[0];
#pragma unroll
    for (; apart > 0; apart /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, apart);
    return sum;
}

// The rows of this thread in a whole tile, by SUMMED_ROWS; returns how many rows that were.
template <class T> FN int sum_whole_rows(const DeviceStep &s, const Tile &tile, double *column_sums) {
    const Items &x = s.items;
    i64 at = tile.row * x.dim + tile.column, further = tile.slots * x.dim;
    double *row_sums = s.row_sums + tile.across * x.num_items + tile.row;
    float scale = x.scale ? *x.scale : 1.0f;
    int end = s.tiling.rows_per_thread, done = 0;
    GradientRows<T> now;
    for (; done + SUMMED_ROWS <= end; done += SUMMED_ROWS) {
        now.read(s, at, further);
        double sums[SUMMED_ROWS];
#pragma unroll
        for (int k = 0; k < SUMMED_ROWS; k++) {
            sums[k] = 0.0;
            float p[COLUMNS] = {};
            if (s.rule.weight_decay != 0.0f) {
                const Part part = {COLUMNS, 1, true};
                load((const T *)x.param + at + k * further, part, p);
            }
#pragma unroll
            for (int v = 0; v < COLUMNS; v++) {
                float g = x.scale ? now.g[k][v] * scale : now.g[k][v];
                double square = (double)gained_square(oriented(g, p[v], s.rule), s.rule);
                sums[k] += square;
                column_sums[v] += square;
            }
        }
        int row = 0;
        double sum = sums_over_lanes(sums, row);
        if (threadIdx.x % (32 / SUMMED_ROWS) == 0) row_sums[(done + row) * tile.slots] = sum;
        at += SUMMED_ROWS * further;
    }
    return done;
}

// A tile of (num_items, dim): partial sums for its rows and for its columns, to row_sums and col_sums. No
// atomics; the order of every sum follows from the tiling, hence from the shape alone.
template <class T> FN void factored_sums(const DeviceStep &s, i64 index) {
    double *block_sums = shared_sums();
    int lanes = s.tiling.lanes, width = lanes * COLUMNS;
    Tile tile = tile_of(s.tiling, index);
    Part part = part_of(tile.column, s.items.dim, tile.apart, s.items.is_aligned);
    int slot = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    i64 begin = tile.across * width;
    double column_sums[COLUMNS] = {};
    int done = 0;
    if (is_whole(s, tile)) {
        done = sum_whole_rows<T>(s, tile, column_sums);
        tile.row += done * tile.slots;
    }
    for (int i = done; i < s.tiling.rows_per_thread; i++, tile.row += tile.slots) {
        bool is_inside = tile.row < s.items.num_items;
        double row_sum = is_inside ? factored_row<T>(s, tile, part, column_sums) : 0.0;
        row_sum = sum_over_lanes(row_sum, lanes);
        if (is_inside && lane == 0) s.row_sums[tile.across * s.items.num_items + tile.row] = row_sum;
    }
    for (int v = 0; v < COLUMNS; v++)
        block_sums[slot * width + tile.column - begin + v * tile.apart] = column_sums[v];
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS) {
        double sum = 0.0;
        for (int k = 0; k < tile.slots; k++) sum += block_sums[k * width + i];
        if (begin + i < s.items.dim) s.col_sums[tile.down * s.items.dim + begin + i] = sum;
    }
    __syncthreads();
}

FN float average_mean(const DeviceStep &s, float old, double mean) {
    return s.rule.second_beta * old + (float)mean;
}

FN void store_factored(const DeviceStep &s, i64 item, double sum) {
    const Items &x = s.items;
    i64 column = item - x.num_items;
    if (column < 0) {
        i64 row = row_of(x, item);
        s.row[row] = average_mean(s, s.row[row], sum / x.dim);
    } else {
        float old = s.col[column];
        double mean = sum / x.num_rows;
        s.col[column] = x.is_dense ? average_mean(s, old, mean) : not_negative(old + (float)mean);
    }
}

// num_items rows, then dim columns: the means after a step of rows. A block has 32 of them, whose partial
// sums SLICES threads add up, each every SLICES-th. No atomics.
FN void factored_store_block(const DeviceStep &s, i64 block) {
    const Items &x = s.items;
    double *block_sums = shared_sums();
    i64 item = block * 32 + threadIdx.x % 32, column = item - x.num_items;
    i64 across = tiles_across(s.tiling), down = s.tiling.num_tiles / across;
    double sum = 0.0;
    if (column < 0)
        for (i64 k = threadIdx.x / 32; k < across; k += SLICES) sum += s.row_sums[k * x.num_items + item];
    else if (column < x.dim)
        for (i64 k = threadIdx.x / 32; k < down; k += SLICES) sum += s.col_sums[k * x.dim + column];
    block_sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < 32 && column < x.dim) {
        for (int k = 1; k < SLICES; k++) sum += block_sums[k * 32 + threadIdx.x];
        store_factored(s, item, sum);
    }
    __syncthreads();
}

// The mean of col, by all threads of a block together. No atomics.
FN void mean_of_columns(const float *col, i64 dim, float *mean) {
    double *block_sums = shared_sums(), sum = 0.0;
    for (i64 i = threadIdx.x; i < dim; i += THREADS) sum += (double)col[i];
    block_sums[threadIdx.x] = sum;
    __syncthreads();
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        if ((int)threadIdx.x < apart) block_sums[threadIdx.x] += block_sums[threadIdx.x + apart];
        __syncthreads();
    }
    if (threadIdx.x == 0) *mean = (float)(block_sums[0] / dim);
    __syncthreads();
}

// One block for each step.
FN void factored_mean_block(const DeviceStep &s, i64) { mean_of_columns(s.col, s.items.dim, s.mean); }

// Elements: what each changes of its row's sum of squares, and its column's; and the column as a key, which
// differs from those of all other steps. No atomics.
template <class T> FN void factored_changes(const DeviceStep &s, i64 block) {
    i64 i = flat_item(block);
    if (i >= s.items.num_items) return;
    i64 row = row_of(s.items, i), column = column_of(s.items, i, row);
    float g = gradient<T>(s.items, s.rule, i, s.items.positions[i]);
    s.changes[i] = column_change(s, gained_square(g, s.rule), s.row[row], s.col[column]);
    s.keys[i] = s.first_key + column;
}

FN void raise_mean(float *mean, double sum, i64 num_averaged) {
    *mean = not_negative(*mean + (float)(sum / num_averaged));
}

// Elements, which are in the order of their rows, and their keys in that of their columns: the thread at
// the first one of a row, or column, adds all of its changes in order. No atomics; any thread order.
FN void factored_raise_block(const DeviceStep &s, i64 block) {
    const Items &x = s.items;
    i64 i = flat_item(block), end = i;
    if (i >= x.num_items) return;
    i64 row = row_of(x, i);
    if (i == 0 || row_of(x, i - 1) != row) {
        double sum = 0.0;
        for (; end < x.num_items && row_of(x, end) == row; end++) sum += s.changes[end];
        raise_mean(&s.row[row], sum, x.dim);
    }
    if (is_first_of_key(s.sorted, i)) {
        double sum = 0.0;
        for (end = i; end < x.num_items && s.sorted[end] == s.sorted[i]; end++)
            sum += s.changes[s.order[end] - s.first_item];
        raise_mean(&s.col[s.sorted[i] - s.first_key], sum, x.num_rows);
    }
}

#if defined(__CUDACC__)
#define SUMMING_KERNEL(NAME, ARGUMENT) \
    extern "C" __global__ void __launch_bounds__(THREADS, SUMMING_THREADS / THREADS) NAME(const ARGUMENT s)
#define SUMS_KERNEL(NAME, FUNCTION) DEFINE_BATCH_KERNEL(SUMMING_KERNEL, NAME, DeviceStep, , FUNCTION)
#else
#define SUMS_KERNEL BATCH_KERNEL
#endif
#define DEFINE(NAME, T)                                   \
    SUMS_KERNEL(factored_sums_##NAME, factored_sums<T>)  \
    BATCH_KERNEL(factored_changes_##NAME, factored_changes<T>)
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
BATCH_KERNEL(factored_store, factored_store_block)
BATCH_KERNEL(factored_mean, factored_mean_block)
BATCH_KERNEL(factored_raise, factored_raise_block)
