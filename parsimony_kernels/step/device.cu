// The operations of step/ops.py on a GPU; step/device.py launches these kernels, and those of the
// headers. runtime/grid.h says on what terms.
#include "step/device_rows.h"
#include "step/device_shared.h"
#include "step/device_sketch.h"
#include "step/entry_roots.h"

// ---- steps with any moments ---------------------------------------------------------------------

// Where an entry is in its row and in the parameter, and what its row and column hold.
struct Entry {
    i64 column, at;
    float row_value, col_value;
};

// What state that is shared says of the second moment: see EntryState.
FN float estimate_of_second(const DeviceStep &s, const Cells &cells, const Entry &e) {
    bool is_alone = !s.items.is_elements && !s.items.is_dense;  // sparse rows: no columns
    if (s.second == SECOND_COVER || s.second == SECOND_COVER_I)
        return is_alone ? e.row_value : smaller(e.row_value, e.col_value);
    if (s.second == SECOND_FACTORED) return e.row_value * relative(e.col_value, *s.mean);
    if (s.second == SECOND_SKETCH) return query(s.second_sketch, cells, e.column);
    return 0.0f;
}

// Return the new parameter; `nu` becomes the second moment.
FN float stepped(const DeviceStep &s, const Entry &e, const Cells &first, const Cells &second, float p,
                 float grad, float &nu) {
    float g = oriented(grad, p, s.rule), taken = 0.0f;
    if (s.first == FIRST_SKETCH) taken = take_first(s.first_sketch, first, e.column, g, s.rule);
    float estimate = estimate_of_second(s, second, e);
    EntryState state = {s.first_values, s.second_values, e.at, taken, estimate};
    return step_entry(s.first, s.second, p, g, state, s.rule, nu);
}

// One row's part of a tile. Returns the row's largest second moment in these columns.
template <class T>
FN u32 step_sketched_row(const DeviceStep &s, const Tile &tile, const Part &part, const float *col,
                         u32 *column_max) {
    const Items &x = s.items;
    i64 row = row_of(x, tile.row), at = row * x.dim + tile.column;
    float p[COLUMNS] = {}, grad[COLUMNS] = {};
    load((const T *)x.param + at, part, p);
    load((const T *)x.grad + tile.row * x.dim + tile.column, part, grad);
    Cells first = {}, second = {};
    if (s.first == FIRST_SKETCH) first = cells_of(s.first_sketch, row);
    if (s.second == SECOND_SKETCH) second = cells_of(s.second_sketch, row);
    float row_value = s.row ? s.row[row] : 0.0f;
    u32 row_max = 0;
#pragma unroll
    for (int v = 0; v < COLUMNS; v++) {
        if (v >= part.count) continue;
        Entry entry = {tile.column + v * tile.apart, at + v * tile.apart, row_value, col[v]};
        float nu = 0.0f;
        p[v] = stepped(s, entry, first, second, p[v], grad[v], nu);
        column_max[v] = larger_bits(column_max[v], as_bits(nu));
        row_max = larger_bits(row_max, as_bits(nu));
    }
    store((T *)x.param + at, part, p);
    return row_max;
}

// A tile as in step_tile, of a step with a sketch. Sketches are only queried: what they have been fed waits
// in `fresh`, and they have their old values.
template <class T> FN void step_sketched(const DeviceStep &s, i64 index) {
    Tile tile = tile_of(s.tiling, index);
    Part part = part_of(tile.column, s.items.dim, tile.apart, s.items.is_aligned);
    float col[COLUMNS] = {};
    if (s.col) load(s.col + tile.column, part, col);
    u32 column_max[COLUMNS] = {};
    for (int i = 0; i < s.tiling.rows_per_thread; i++, tile.row += tile.slots) {
        bool is_inside = tile.row < s.items.num_items;
        u32 row_max = 0;
        if (is_inside) row_max = step_sketched_row<T>(s, tile, part, col, column_max);
        if (s.second == SECOND_COVER) {  // threads outside come too: a warp may hold several rows
            row_max = max_over_lanes(row_max, s.tiling.lanes);
            if (is_inside && threadIdx.x % s.tiling.lanes == 0)
                atomicMax(&s.row_max[tile.row], row_max);
        }
    }
    if (s.second == SECOND_COVER) raise_columns(s, tile, column_max);
}

// Elements. With a Cover, reads the accumulators as they were (II) or as variant I raised them, and leaves
// in `averages` what cover_raise is to raise them to (II). No atomics.
template <class T> FN void step_elements(const DeviceStep &s, i64 block) {
    const Items &x = s.items;
    i64 i = flat_item(block);
    if (i >= x.num_items) return;
    i64 row = row_of(x, i), column = column_of(x, i, row);
    Cells first = {}, second = {};
    if (s.first == FIRST_SKETCH) first = cells_of(s.first_sketch, row);
    if (s.second == SECOND_SKETCH) second = cells_of(s.second_sketch, row);
    float row_value = s.row ? s.row[row] : 0.0f, col_value = s.col ? s.col[column] : 0.0f;
    Entry entry = {column, x.positions[i], row_value, col_value};
    float nu = 0.0f, p = param_at<T>(x, entry.at);
    float value = stepped(s, entry, first, second, p, ((const float *)x.grad)[i], nu);
    ((T *)x.param)[entry.at] = narrow<T>(value);
    if (s.second == SECOND_COVER) s.averages[i] = s.averages[x.num_items + i] = nu;
}

// Rows or elements that are not ascending, unique and in range. One atomic for each.
FN void find_wrong_position(const DeviceStep &s, i64 block) {
    const Items &x = s.items;
    i64 i = flat_item(block);
    if (i >= x.num_items) return;
    i64 bound = x.is_elements ? x.num_rows * x.dim : x.num_rows;
    i64 before = i == 0 ? -1 : x.positions[i - 1], at = x.positions[i];
    if (at <= before || at >= bound) atomicMax(s.is_wrong, 1u);
}
BATCH_KERNEL(find_wrong_positions, find_wrong_position)

// ---- roots --------------------------------------------------------------------------------------

// A block for each tensor. No atomics.
KERNEL(root_means, Rootings) {
    for (i64 n = blockIdx.x; n < s.count; n += gridDim.x) {
        const Rooting &r = s.rootings[n];
        if (r.kind == SECOND_FACTORED) mean_of_columns(r.col, r.dim, r.mean);
    }
}

// Flat over the positions. No atomics.
KERNEL(roots_at, Rootings) {
    const i64 end = s.rootings[s.count - 1].end;
    for (i64 j = flat_start(); j < end; j += flat_stride()) {
        const Rooting &r = s.rootings[part_with(j, s.rootings, s.count)];
        s.roots[j] = root_at(r, s.positions[j] - r.first, r.kind == SECOND_FACTORED ? *r.mean : 0.0f);
    }
}

#define DEFINE(NAME, T)                                  \
    BATCH_KERNEL(step_sketched_##NAME, step_sketched<T>) \
    BATCH_KERNEL(step_elements_##NAME, step_elements<T>)
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
