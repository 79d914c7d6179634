// The operations of step/ops.py on a GPU; step/device.py launches these kernels, and those of the
// headers. runtime/grid.h says on what terms.
#include "step/device_shared.h"
#include "step/device_sketch.h"
#include "step/device_tiles.h"
#include "step/entry.h"

// ---- one entry's step ---------------------------------------------------------------------------

// Where an entry is in its row and in the parameter, and what its row and column hold.
struct Entry {
    i64 column, at;
    float row_value, col_value;
};

// What state that is shared says of the second moment: see EntryState. In kernels that are not IS_SKETCHED
// neither moment is a sketch, which saves registers.
template <bool IS_SKETCHED>
FN float estimate_of_second(const DeviceStep &s, int kind, const Cells &cells, const Entry &e) {
    bool is_alone = !s.items.is_elements && !s.items.is_dense;  // sparse rows: no columns
    if (kind == SECOND_COVER || kind == SECOND_COVER_I)
        return is_alone ? e.row_value : smaller(e.row_value, e.col_value);
    if (kind == SECOND_FACTORED) return e.row_value * relative(e.col_value, *s.mean);
    if (IS_SKETCHED && kind == SECOND_SKETCH) return query(s.second_sketch, cells, e.column);
    return 0.0f;
}

// Return the new parameter; `nu` becomes the second moment, which is of this kind.
template <bool IS_SKETCHED>
FN float stepped(const DeviceStep &s, int kind, const Entry &e, const Cells &first, const Cells &second,
                 float p, float grad, float &nu) {
    float g = oriented(grad, p, s.rule), taken = 0.0f;
    if (IS_SKETCHED && s.first == FIRST_SKETCH)
        taken = take_first(s.first_sketch, first, e.column, g, s.rule);
    float estimate = estimate_of_second<IS_SKETCHED>(s, kind, second, e);
    EntryState state = {s.first_values, s.second_values, e.at, taken, estimate};
    return step_entry(s.first, kind, p, g, state, s.rule, nu);
}

// ---- steps of rows ------------------------------------------------------------------------------

// One row's part of a tile. Everything is read before anything is written, so that the reads of all
// columns are under way together. Returns the row's maximum in these columns.
template <class T, bool IS_COVER, bool IS_SKETCHED>
FN u32 step_row(const DeviceStep &s, const Tile &tile, const float *col_values, u32 *column_max) {
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
        Entry entry = {column, row * x.dim + column, row_value, col_values[v]};
        float nu = 0.0f;
        int kind = IS_COVER ? SECOND_COVER : s.second;  // known to the compiler where it matters
        float value = stepped<IS_SKETCHED>(s, kind, entry, first, second, p[v], grad[v], nu);
        ((T *)x.param)[entry.at] = narrow<T>(value);
        if (IS_COVER) {
            column_max[v] = larger_bits(column_max[v], as_bits(nu));
            row_max = larger_bits(row_max, as_bits(nu));
        }
    }
    return row_max;
}

// Tiles of (num_items, dim). Reads the gradient once; reads and writes the parameter and the moments that
// are kept in full. Sketches were fed before and are only queried (a first moment's still has its old
// values: the new ones wait in `fresh`). With a Cover (variant II) the step's maxima go to row_max, one
// atomic for each row of a tile, and col_max, one for each of its columns. The order of threads changes
// no result.
template <class T, bool IS_COVER, bool IS_SKETCHED> FN void step_tiles(const DeviceStep &s) {
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
    STREAMING_KERNEL(step_##NAME, DeviceStep) { step_tiles<T, false, false>(s); }      \
    STREAMING_KERNEL(step_cover_##NAME, DeviceStep) { step_tiles<T, true, false>(s); } \
    KERNEL(step_sketch_##NAME, DeviceStep) {                                          \
        if (s.second == SECOND_COVER) step_tiles<T, true, true>(s);                 \
        else step_tiles<T, false, true>(s);                                         \
    }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

// ---- gradients that are only observed -----------------------------------------------------------

// Flat over all elements: Full's average; the other kinds are fed as a step feeds them. No atomics.
template <class T> FN void observe_full(const DeviceStep &s) {
    for (i64 i = flat_start(); i < s.items.num_items * s.items.dim; i += flat_stride()) {
        float g = gradient<T>(s.items, s.rule, i, i);
        s.second_values[i] = average_second(s.second_values[i], g, s.rule);
    }
}

#define DEFINE(NAME, T) \
    KERNEL(observe_full_##NAME, DeviceStep) { observe_full<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

// ---- steps of elements --------------------------------------------------------------------------

// Flat over elements. With a Cover, reads the accumulators as they were (II) or as variant I raised
// them, and leaves in `averages` what cover_raise is to raise them to (II). No atomics.
template <class T> FN void step_elements(const DeviceStep &s) {
    const Items &x = s.items;
    for (i64 i = flat_start(); i < x.num_items; i += flat_stride()) {
        i64 row = row_of(x, i), column = column_of(x, i, row);
        Cells first = {}, second = {};
        if (s.first == FIRST_SKETCH) first = cells_of(s.first_sketch, row);
        if (s.second == SECOND_SKETCH) second = cells_of(s.second_sketch, row);
        float row_value = s.row ? s.row[row] : 0.0f, col_value = s.col ? s.col[column] : 0.0f;
        Entry entry = {column, x.positions[i], row_value, col_value};
        float nu = 0.0f, p = param_at<T>(x, entry.at);
        float grad = ((const float *)x.grad)[i];
        float value = stepped<true>(s, s.second, entry, first, second, p, grad, nu);
        ((T *)x.param)[entry.at] = narrow<T>(value);
        if (s.second == SECOND_COVER) s.averages[i] = s.averages[x.num_items + i] = nu;
    }
}

#define DEFINE(NAME, T) \
    KERNEL(step_elements_##NAME, DeviceStep) { step_elements<T>(s); }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE
