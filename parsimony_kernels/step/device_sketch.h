// Sketches on the device: queries and insertions.
//
// Rows that share a bucket are gathered, not added atomically: the launcher sorts the rows by bucket,
// stably, and one thread adds a bucket's rows in their order.
#pragma once

#include "step/device_tiles.h"
#include "step/sketch.h"

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

// What the update takes for a first moment; the table must be as it was before this step.
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

// (depth, item): which cell each item falls into. No atomics; any thread order.
FN void sketch_cells_block(const Feeding &s, i64 block) {
    const Sketch &k = s.sketch;
    i64 i = flat_item(block);
    if (i >= k.depth * s.items.num_items) return;
    i64 j = i / s.items.num_items, item = i - j * s.items.num_items, row = row_of(s.items, item);
    i64 cell = j * k.width + bucket_of(hash_row(row, k.seeds[j]), k.width);
    if (s.items.is_elements) cell = cell * k.dim + column_of(s.items, item, row);
    s.cells[i] = s.first_cell + cell;
}
FEEDING_KERNEL(sketch_cells, sketch_cells_block)

// Tiles of (num_items, dim). No atomics; any thread order.
KERNEL(sketch_query, Query) {
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

// Flat over elements. No atomics; any thread order.
KERNEL(sketch_query_elements, Query) {
    for (i64 i = flat_start(); i < s.items.num_items; i += flat_stride()) {
        i64 row = row_of(s.items, i);
        Cells cells = cells_of(s.sketch, row);
        s.estimates[i] = query(s.sketch, cells, column_of(s.items, i, row));
    }
}

// What an item inserts in one column, times the gain.
template <class T> FN float fed_value(const Feeding &s, i64 item, i64 row, i64 column) {
    const Items &x = s.items;
    i64 source = x.is_elements ? item : item * x.dim + column;
    if (s.inserted == INSERTED_VALUES) return ((const float *)x.grad)[source] * s.gain;
    i64 at = x.is_elements ? x.positions[item] : row * x.dim + column;
    float g = gradient<T>(x, s.rule, source, at);
    return s.inserted == INSERTED_SQUARE ? g * s.gain * g : g * s.gain;
}

// Add up gain x - rate estimate over the items of entries [begin, end), which share a cell.
template <class T>
FN void sum_of_cell(const Feeding &s, i64 begin, i64 end, i64 first_column, float *sums) {
    const Sketch &k = s.sketch;
    i64 j = (s.order[begin] - s.first_entry) / s.items.num_items;
    float rate = bounded_forgetting(s.forgetting, end - begin, k.is_signed);
    for (i64 i = begin; i < end; i++) {
        i64 item = s.order[i] - s.first_entry - j * s.items.num_items, row = row_of(s.items, item);
        Cells cells = cells_of(k, row);
        float sign = k.is_signed ? sign_of(hash_row(row, k.seeds[j])) : 1.0f;
        for (int v = 0; v < COLUMNS; v++) {
            i64 column = first_column + v * s.tiling.lanes;
            if (column >= s.tiling.num_columns) break;
            if (s.items.is_elements) column = column_of(s.items, item, row);
            float old = s.forgetting != 0.0f ? query(k, cells, column) : 0.0f;
            sums[v] += (fed_value<T>(s, item, row, column) - old * rate) * sign;
        }
    }
}

// A tile of (depth * num_items, dim), or for elements (depth * num_items, 1), over the sorted cells: the
// thread at a cell's first entry adds all of its items in their order; the others have nothing to do. Where
// estimates are needed every item's `depth` buckets are read once for each of them. They are read from the
// table as it was, so new values go to `fresh`; where nothing more is read from that, straight into the
// table. No atomics; any thread order.
template <class T> FN void sketch_update(const Feeding &s, i64 index) {
    i64 num_entries = s.tiling.num_rows, num_columns = s.tiling.num_columns;
    Tile tile = tile_of(s.tiling, index);
    for (int n = 0; n < s.tiling.rows_per_thread; n++, tile.row += tile.slots) {
        i64 begin = tile.row, end = begin + 1;
        if (begin >= num_entries) break;
        if (!is_first_of_key(s.sorted, begin)) continue;
        while (end < num_entries && s.sorted[end] == s.sorted[begin]) end++;
        float sums[COLUMNS] = {};
        sum_of_cell<T>(s, begin, end, tile.column, sums);
#pragma unroll
        for (int v = 0; v < COLUMNS; v++) {
            i64 column = tile.column + v * s.tiling.lanes;
            if (column >= num_columns) break;
            i64 cell = (s.sorted[begin] - s.first_cell) * num_columns + column;
            float value = s.keep * s.sketch.values[cell] + sums[v];
            if (!s.sketch.is_signed) value = not_negative(value);
            if (s.fresh) s.fresh[(s.ranks[begin] - s.ranks[0]) * num_columns + column] = value;
            else s.sketch.values[cell] = value;
        }
    }
}

// The same tiles: moves `fresh` into the table. No atomics; any thread order.
FN void sketch_store_tile(const Feeding &s, i64 index) {
    i64 num_columns = s.tiling.num_columns;
    Tile tile = tile_of(s.tiling, index);
    for (int n = 0; n < s.tiling.rows_per_thread; n++, tile.row += tile.slots) {
        if (tile.row >= s.tiling.num_rows) break;
        if (!is_first_of_key(s.sorted, tile.row)) continue;
        i64 target = (s.sorted[tile.row] - s.first_cell) * num_columns;
        i64 source = (s.ranks[tile.row] - s.ranks[0]) * num_columns;
        for (int v = 0; v < COLUMNS; v++) {
            i64 column = tile.column + v * s.tiling.lanes;
            if (column >= num_columns) break;
            s.sketch.values[target + column] = s.fresh[source + column];
        }
    }
}

#define DEFINE(NAME, T) FEEDING_KERNEL(sketch_update_##NAME, sketch_update<T>)
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
FEEDING_KERNEL(sketch_store, sketch_store_tile)
