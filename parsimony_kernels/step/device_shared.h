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

// Tiles of (num_items, dim): the maxima of covered_square. Atomics as in step_tiles.
template <class T> FN void cover_maxima(const DeviceStep &s) {
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
    KERNEL(cover_maxima_##NAME, DeviceStep) { cover_maxima<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

FN float covered(const DeviceStep &s, float old, u32 max) {
    if (s.second == SECOND_COVER) return as_float(max);
    return s.rule.second_beta * old + as_float(max);
}

// Flat over num_items rows, then dim columns: the accumulators after a step of rows. No atomics.
KERNEL(cover_store, DeviceStep) {
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
template <class T> FN void cover_averages(const DeviceStep &s) {
    for (i64 i = flat_start(); i < s.items.num_items; i += flat_stride()) {
        i64 row = row_of(s.items, i), column = column_of(s.items, i, row);
        float g = gradient<T>(s.items, s.rule, i, s.items.positions[i]);
        s.averages[i] = average_second(s.row[row], g, s.rule);
        s.averages[s.items.num_items + i] = average_second(s.col[column], g, s.rule);
    }
}

#define DEFINE(NAME, T) \
    KERNEL(cover_averages_##NAME, DeviceStep) { cover_averages<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

// Flat over elements: two atomic maxima for each.
KERNEL(cover_raise, DeviceStep) {
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
FN double column_change(const DeviceStep &s, float square, float row, float col) {
    if (s.items.is_dense) return (double)square;
    double estimate = (double)(row * relative(col, *s.mean));
    return (double)square - estimate * s.rule.second_forgetting;
}

// One row's part of a tile; returns the sum of its squares in these columns.
template <class T>
FN double factored_row(const DeviceStep &s, const Tile &tile, double *column_sums) {
    i64 row = row_of(s.items, tile.row), dim = s.items.dim;
    double row_sum = 0.0;
    for (int v = 0; v < COLUMNS; v++) {
        i64 column = tile.column + v * s.tiling.lanes;
        if (column >= dim) break;
        float g = gradient<T>(s.items, s.rule, tile.row * dim + column, row * dim + column);
        float square = gained_square(g, s.rule);
        row_sum += (double)square;
        column_sums[v] += column_change(s, square, s.row[row], s.col[column]);
    }
    return row_sum;
}

// Tiles of (num_items, dim): partial sums for the rows of a tile and for its columns, to row_sums
// and col_sums. No atomics; the order of every sum follows from the tiling, hence from the shape
// alone.
template <class T> FN void factored_sums(const DeviceStep &s) {
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
    KERNEL(factored_sums_##NAME, DeviceStep) { factored_sums<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

FN double sum_of(const double *partial, i64 count, i64 stride) {
    double sum = 0.0;
    for (i64 i = 0; i < count; i++) sum += partial[i * stride];
    return sum;
}

FN float average_mean(const DeviceStep &s, float old, double mean) {
    return s.rule.second_beta * old + (float)mean;
}

// Flat over num_items rows, then dim columns: the means after a step of rows. No atomics.
KERNEL(factored_store, DeviceStep) {
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
template <class T> FN void factored_changes(const DeviceStep &s) {
    for (i64 i = flat_start(); i < s.items.num_items; i += flat_stride()) {
        i64 row = row_of(s.items, i), column = column_of(s.items, i, row);
        float g = gradient<T>(s.items, s.rule, i, s.items.positions[i]);
        s.changes[i] = column_change(s, gained_square(g, s.rule), s.row[row], s.col[column]);
    }
}

#define DEFINE(NAME, T) \
    KERNEL(factored_changes_##NAME, DeviceStep) { factored_changes<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

// Flat over elements sorted by row or by column: the thread at a key's first entry adds all changes
// of that key in order. No atomics; any thread order.
KERNEL(factored_raise, DeviceStep) {
    for (i64 i = flat_start(); i < s.items.num_items; i += flat_stride()) {
        if (!is_first_of_key(s.keys, i)) continue;
        double sum = 0.0;
        for (i64 end = i; end < s.items.num_items && s.keys[end] == s.keys[i]; end++)
            sum += s.changes[s.order[end]];
        float *mean = &s.means[s.keys[i]];
        *mean = not_negative(*mean + (float)(sum / s.num_averaged));
    }
}
