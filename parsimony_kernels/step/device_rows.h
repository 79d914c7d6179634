// Steps of dense gradients, and of rows, whose moments are no sketches.
#pragma once

#include "step/device_tiles.h"

// What a thread has in hand of COLUMNS entries. FIRST, from here on: whether there may be a first moment.
struct Entries {
    float p[COLUMNS], grad[COLUMNS], m[COLUMNS], v[COLUMNS];
};

template <class T, bool FIRST, int SECOND>
FN void load_entries(const DeviceStep &s, i64 source, i64 at, const Part &part, Entries &e) {
    load((const T *)s.items.param + at, part, e.p);
    load((const T *)s.items.grad + source, part, e.grad);
    if (FIRST && s.first != FIRST_NONE) load(s.first_values + at, part, e.m);
    if (SECOND == SECOND_FULL) load(s.second_values + at, part, e.v);
}

template <class T, bool FIRST, int SECOND>
FN void store_entries(const DeviceStep &s, i64 at, const Part &part, const Entries &e) {
    store((T *)s.items.param + at, part, e.p);
    if (FIRST && s.first != FIRST_NONE) store(s.first_values + at, part, e.m);
    if (SECOND == SECOND_FULL) store(s.second_values + at, part, e.v);
}

// Step entry number `v`; returns its second moment. `estimate`: see EntryState.
template <bool FIRST, int SECOND>
FN float step_one(const DeviceStep &s, int v, float estimate, Entries &e) {
    EntryState state = {e.m, e.v, v, 0.0f, estimate};
    float nu = 0.0f, g = oriented(e.grad[v], e.p[v], s.rule);
    e.p[v] = step_entry(FIRST ? s.first : FIRST_NONE, SECOND, e.p[v], g, state, s.rule, nu);
    return nu;
}

// ---- entries that share no state ------------------------------------------------------------------

// A block of rows_per_thread * THREADS * COLUMNS entries of a dense gradient, whatever its shape.
template <class T, bool FIRST, int SECOND> FN void step_flat(const DeviceStep &s, i64 block) {
    i64 size = s.items.num_items * s.items.dim;
    for (int i = 0; i < s.tiling.rows_per_thread; i++) {
        i64 at = ((block * s.tiling.rows_per_thread + i) * THREADS + threadIdx.x) * COLUMNS;
        Part part = part_of(at, size, 1, s.items.is_aligned);
        Entries e = {};
        load_entries<T, FIRST, SECOND>(s, at, at, part, e);
#pragma unroll
        for (int v = 0; v < COLUMNS; v++) step_one<FIRST, SECOND>(s, v, 0.0f, e);
        store_entries<T, FIRST, SECOND>(s, at, part, e);
    }
}

// The same for a second moment in full that is only fed.
template <class T> FN void observe_flat(const DeviceStep &s, i64 block) {
    i64 size = s.items.num_items * s.items.dim;
    for (int i = 0; i < s.tiling.rows_per_thread; i++) {
        i64 at = ((block * s.tiling.rows_per_thread + i) * THREADS + threadIdx.x) * COLUMNS;
        Part part = part_of(at, size, 1, s.items.is_aligned);
        float g[COLUMNS] = {}, nu[COLUMNS] = {};
        load_gradient<T>(s.items, s.rule, at, at, part, g);
        load(s.second_values + at, part, nu);
        for (int v = 0; v < COLUMNS; v++) nu[v] = average_second(nu[v], g[v], s.rule);
        store(s.second_values + at, part, nu);
    }
}

// ---- rows -----------------------------------------------------------------------------------------

// The state that an entry shares with its row and its column, as EntryState has it.
template <int SECOND> FN float shared_estimate(const DeviceStep &s, float row, float col, float mean) {
    if (SECOND == SECOND_FACTORED) return row * relative(col, mean);
    return s.items.is_dense ? smaller(row, col) : row;  // sparse rows have no columns: see ops.step
}

// Step the entries of one row, which have been read. Returns the row's largest second moment in these
// columns.
template <bool FIRST, int SECOND>
FN u32 step_row(const DeviceStep &s, i64 row, const Part &part, const float *col, float mean, Entries &e,
                u32 *column_max) {
    const bool is_shared = SECOND >= SECOND_COVER && SECOND <= SECOND_FACTORED;
    float row_value = is_shared ? s.row[row] : 0.0f;
    u32 row_max = 0;
#pragma unroll
    for (int v = 0; v < COLUMNS; v++) {
        float estimate = is_shared ? shared_estimate<SECOND>(s, row_value, col[v], mean) : 0.0f;
        u32 bits = as_bits(step_one<FIRST, SECOND>(s, v, estimate, e));
        if (SECOND == SECOND_COVER && v < part.count) {
            column_max[v] = larger_bits(column_max[v], bits);
            row_max = larger_bits(row_max, bits);
        }
    }
    return row_max;
}

// Rows of a thread that are read together, so that the memory always has something to do.
const int TOGETHER = 2;

template <class T, bool FIRST, int SECOND> struct RowsTogether {
    Entries rows[TOGETHER];
    float values[TOGETHER];  // of the row means or accumulators

    FN void read(const DeviceStep &s, i64 row, i64 at, i64 slots) {
        const Part part = {COLUMNS, 1, true};
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            load_entries<T, FIRST, SECOND>(s, at, at, part, rows[k]);
            values[k] = s.row[row + k * slots];
            at += slots * s.items.dim;
        }
    }
};

FN void raise_row(const DeviceStep &s, i64 row, u32 max) {
#if defined(__CUDACC__)
    asm volatile("red.global.max.u32 [%0], %1;" ::"l"(&s.row_max[row]), "r"(max) : "memory");
#else
    atomicMax(&s.row_max[row], max);
#endif
}

// All rows of this thread in a tile with none missing, of a dense gradient, with a Cover or Factored. A row's
// maximum waits in a lane until the warp has one for each lane, or is at its end: one instruction raises all.
template <class T, bool FIRST, int SECOND>
FN void step_whole_rows(const DeviceStep &s, Tile tile, const float *col, float mean, u32 *column_max) {
    const Part part = {COLUMNS, 1, true};
    const int end = s.tiling.rows_per_thread, lane = threadIdx.x % 32;
    i64 at = tile.row * s.items.dim + tile.column, further = tile.slots * s.items.dim;
    RowsTogether<T, FIRST, SECOND> now;
    u32 kept = 0;
    int done = 0;
#pragma unroll 1
    for (; done + TOGETHER <= end; done += TOGETHER) {
        now.read(s, tile.row, at, tile.slots);
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            u32 row_max = 0;
            for (int v = 0; v < COLUMNS; v++) {
                float estimate = shared_estimate<SECOND>(s, now.values[k], col[v], mean);
                u32 bits = as_bits(step_one<FIRST, SECOND>(s, v, estimate, now.rows[k]));
                if (SECOND != SECOND_COVER) continue;
                column_max[v] = larger_bits(column_max[v], bits);
                row_max = larger_bits(row_max, bits);
            }
            store_entries<T, FIRST, SECOND>(s, at, part, now.rows[k]);
            if (SECOND == SECOND_COVER) {
                row_max = max_over_lanes(row_max, 32);
                if (lane == (done + k) % 32) kept = row_max;
                if ((done + k) % 32 == 31) raise_row(s, tile.row + (lane - 31) * tile.slots, kept);
            }
            at += further;
            tile.row += tile.slots;
        }
    }
    if (SECOND == SECOND_COVER && lane < done % 32)
        raise_row(s, tile.row + (lane - done % 32) * tile.slots, kept);
    for (; done < end; done++, tile.row += tile.slots, at += further) {
        Entries e;
        load_entries<T, FIRST, SECOND>(s, at, at, part, e);
        u32 row_max = step_row<FIRST, SECOND>(s, tile.row, part, col, mean, e, column_max);
        store_entries<T, FIRST, SECOND>(s, at, part, e);
        if (SECOND == SECOND_COVER) {
            row_max = max_over_lanes(row_max, 32);
            if (lane == 0) raise_row(s, tile.row, row_max);
        }
    }
}

// The same of any tile.
template <class T, bool FIRST, int SECOND>
FN void step_rows(const DeviceStep &s, Tile tile, const Part &part, const float *col, float mean,
                  u32 *column_max) {
    for (int i = 0; i < s.tiling.rows_per_thread; i++, tile.row += tile.slots) {
        bool is_inside = tile.row < s.items.num_items;
        u32 row_max = 0;
        if (is_inside) {
            i64 row = row_of(s.items, tile.row), at = row * s.items.dim + tile.column;
            Entries e = {};
            load_entries<T, FIRST, SECOND>(s, tile.row * s.items.dim + tile.column, at, part, e);
            row_max = step_row<FIRST, SECOND>(s, row, part, col, mean, e, column_max);
            store_entries<T, FIRST, SECOND>(s, at, part, e);
        }
        if (SECOND == SECOND_COVER) {  // threads outside come too: a warp may hold several rows
            row_max = max_over_lanes(row_max, s.tiling.lanes);
            if (is_inside && threadIdx.x % s.tiling.lanes == 0)
                atomicMax(&s.row_max[tile.row], row_max);
        }
    }
}

// A tile of (num_items, dim). Reads the gradient once; reads and writes the parameter and the moments that
// are kept in full. With a Cover (variant II) the step's maxima go to row_max, one atomic for each row of
// a tile, and col_max, one for each of its columns. The order of threads changes no result.
template <class T, bool FIRST, int SECOND> FN void step_tile(const DeviceStep &s, i64 index) {
    // From the end, which factored_sums has just read: what is still in the second cache is read there.
    if (SECOND == SECOND_FACTORED) index = s.tiling.num_tiles - 1 - index;
    Tile tile = tile_of(s.tiling, index);
    Part part = part_of(tile.column, s.items.dim, tile.apart, s.items.is_aligned);
    bool is_shared = SECOND >= SECOND_COVER && SECOND <= SECOND_FACTORED;
    float col[COLUMNS] = {}, mean = SECOND == SECOND_FACTORED ? *s.mean : 0.0f;
    if (is_shared) load(s.col + tile.column, part, col);
    u32 column_max[COLUMNS] = {};
    if ((SECOND == SECOND_COVER || SECOND == SECOND_FACTORED) && is_whole(s, tile))
        step_whole_rows<T, FIRST, SECOND>(s, tile, col, mean, column_max);
    else
        step_rows<T, FIRST, SECOND>(s, tile, part, col, mean, column_max);
    if (SECOND == SECOND_COVER) raise_columns(s, tile, column_max);
}

template <class T, bool FIRST> FN void step_flat_of_kind(const DeviceStep &s, i64 block) {
    if (s.second == SECOND_FULL) step_flat<T, FIRST, SECOND_FULL>(s, block);
    else step_flat<T, FIRST, SECOND_NONE>(s, block);
}

template <class T> FN void step_tile_of_kind(const DeviceStep &s, i64 index) {
    if (s.second == SECOND_FULL) step_tile<T, true, SECOND_FULL>(s, index);
    else if (s.second == SECOND_COVER_I) step_tile<T, true, SECOND_COVER_I>(s, index);
    else step_tile<T, true, SECOND_NONE>(s, index);
}

// step_flat_*, dense: no second moment, or a full one. step_rows_*: the same of rows, and Cover I, with or
// without a first moment.
#define DEFINE(NAME, T)                                                                        \
    STREAMING_BATCH_KERNEL(step_flat_##NAME, (step_flat_of_kind<T, false>))                    \
    STREAMING_BATCH_KERNEL(step_flat_first_##NAME, (step_flat_of_kind<T, true>))               \
    BATCH_KERNEL(step_rows_##NAME, step_tile_of_kind<T>)                                       \
    STREAMING_BATCH_KERNEL(step_cover_##NAME, (step_tile<T, false, SECOND_COVER>))             \
    STREAMING_BATCH_KERNEL(step_cover_first_##NAME, (step_tile<T, true, SECOND_COVER>))        \
    STREAMING_BATCH_KERNEL(step_factored_##NAME, (step_tile<T, false, SECOND_FACTORED>))       \
    STREAMING_BATCH_KERNEL(step_factored_first_##NAME, (step_tile<T, true, SECOND_FACTORED>))  \
    BATCH_KERNEL(observe_flat_##NAME, observe_flat<T>)
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
