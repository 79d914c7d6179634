// Tiles: how a kernel's threads divide rows and columns among them; and what they read there.
//
// A tile is THREADS / lanes rows by lanes * COLUMNS columns. `lanes` neighbouring threads (a power of
// two up to 32) have a row together. Each has COLUMNS of its columns, `lanes` apart, so that accesses
// coalesce whatever the alignment; and that in rows_per_thread rows.
#pragma once

#include "runtime/grid.h"
#include "step/entry.h"

FN i64 tiles_across(const Tiling &t) {
    i64 width = t.lanes * COLUMNS;
    return (t.num_columns + width - 1) / width;
}

// This thread's part of a tile.
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

// The gradient as statistics see it. `source` is an index of grad, `at` one of param, which is read only
// for weight decay; an observed gradient has none.
template <class T> FN float gradient(const Items &x, const Rule &r, i64 source, i64 at) {
    float p = r.weight_decay != 0.0f ? param_at<T>(x, at) : 0.0f;
    return oriented(grad_at<T>(x, source), p, r);
}

// ---- maxima and sums of a tile --------------------------------------------------------------------

// Memory that a block's threads share. Not declared in templates, as tests/emulation could not find it.
FN u32 *shared_maxima() {
    __shared__ u32 maxima[32 * COLUMNS];
    return maxima;
}

FN double *shared_sums() {
    __shared__ double sums[THREADS * COLUMNS];
    return sums;
}

// Raise col_max by a tile's maxima; all of the block's threads must come here together. `block_max`
// is shared and all 0, before and after.
FN void raise_columns(const DeviceStep &s, i64 tile_across, const u32 *column_max, u32 *block_max) {
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
