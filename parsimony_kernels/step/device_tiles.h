// Work that is divided among blocks and threads: batches of steps, tiles of rows and columns, and what a
// thread reads of them.
//
// A batch is many tensors' steps in one launch. Each step is some blocks of work, and blocks of the grid
// take these in turn, whosever they are.
//
// A tile is THREADS / lanes rows by lanes * COLUMNS columns. `lanes` neighbouring threads (a power of
// two up to 32) have a row together. Each has COLUMNS of its columns, and that in rows_per_thread rows.
// In a packed tiling (rows of a multiple of COLUMNS) a thread's columns are neighbours, so that it reads
// them in one go; otherwise they are `lanes` apart, so that accesses coalesce whatever the alignment.
// Which it is follows from the shape alone, as the order of sums follows from it.
#pragma once

#include "runtime/grid.h"
#include "step/entry.h"

// ---- batches ------------------------------------------------------------------------------------

// Define a kernel that calls FUNCTION(a step, the number of one of its blocks) for all blocks of a batch; or
// a feeding in place of a step. A step is copied, so that what the compiler has read of it need not be read
// again after each store.
#define BATCH_KERNEL(NAME, FUNCTION) DEFINE_BATCH_KERNEL(KERNEL, NAME, DeviceStep, , FUNCTION)
#define FEEDING_KERNEL(NAME, FUNCTION) DEFINE_BATCH_KERNEL(KERNEL, NAME, Feeding, &, FUNCTION)
#define STREAMING_BATCH_KERNEL(NAME, FUNCTION) \
    DEFINE_BATCH_KERNEL(STREAMING_KERNEL, NAME, DeviceStep, , FUNCTION)
#define DEFINE_BATCH_KERNEL(DECLARE, NAME, KIND, REFERENCE, FUNCTION)       \
    DECLARE(NAME, Batch) {                                                  \
        for (i64 i = blockIdx.x; i < num_blocks(s); i += gridDim.x) {       \
            Work work = work_of(s, i);                                      \
            const KIND REFERENCE step = ((const KIND *)s.steps)[work.step]; \
            (FUNCTION)(step, work.block);                                   \
        }                                                                   \
    }

// The number of this thread's item in a block of THREADS of them.
FN i64 flat_item(i64 block) { return block * THREADS + threadIdx.x; }

// ---- tiles --------------------------------------------------------------------------------------

FN i64 tiles_across(const Tiling &t) {
    i64 width = t.lanes * COLUMNS;
    return (t.num_columns + width - 1) / width;
}

// This thread's part of a tile.
struct Tile {
    i64 across, down, column, row;  // its first ones; the next are `apart` and `slots` further
    int apart, slots;
};

FN Tile tile_of(const Tiling &t, i64 index) {
    Tile tile;
    int lane = threadIdx.x % t.lanes;
    tile.slots = THREADS / t.lanes;
    tile.down = index / tiles_across(t);
    tile.across = index - tile.down * tiles_across(t);
    tile.apart = t.is_packed ? 1 : t.lanes;
    tile.column = tile.across * t.lanes * COLUMNS + (t.is_packed ? lane * COLUMNS : lane);
    tile.row = tile.down * tile.slots * t.rows_per_thread + threadIdx.x / t.lanes;
    return tile;
}

// COLUMNS elements at once.
template <class T> struct alignas(COLUMNS * sizeof(T)) Several { T x[COLUMNS]; };

// How a thread reads and writes its columns of a row: `count` of them, `apart` from each other.
struct Part {
    int count, apart;
    bool is_whole;  // COLUMNS neighbours on a boundary
};

FN Part part_of(i64 column, i64 num_columns, int apart, bool is_aligned) {
    i64 rest = num_columns - column, count = rest <= 0 ? 0 : (rest + apart - 1) / apart;
    Part part = {(int)(count < COLUMNS ? count : COLUMNS), apart, false};
    part.is_whole = is_aligned && apart == 1 && count >= COLUMNS;
    return part;
}

// Whether a tile is of a dense gradient, ends within it, and lies on boundaries.
FN bool is_whole(const DeviceStep &s, const Tile &tile) {
    const Items &x = s.items;
    i64 height = (i64)tile.slots * s.tiling.rows_per_thread;
    return x.is_dense && x.is_aligned && tile.apart == 1 && s.tiling.lanes == 32 &&
           (tile.across + 1) * 32 * COLUMNS <= x.dim && (tile.down + 1) * height <= x.num_items;
}

// COLUMNS elements on a boundary, in one go: a structure's copy the compiler may split.
#if defined(__CUDACC__)
template <class T> FN Several<T> several_at(const T *from) {
    union { Several<T> all; u32 words[COLUMNS * sizeof(T) / 4]; } u;
    u32 *words = u.words, *last = u.words + COLUMNS * sizeof(T) / 4 - 2;
    if (sizeof(T) == 4)
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(last[0]), "=r"(last[1]) : "l"(from));
    else
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
    return u.all;
}

template <class T> FN void put_several(T *to, const Several<T> &all) {
    union { Several<T> all; u32 words[COLUMNS * sizeof(T) / 4]; } u;
    u.all = all;
    const u32 *words = u.words, *last = u.words + COLUMNS * sizeof(T) / 4 - 2;
    if (sizeof(T) == 4)
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                     :: "l"(to), "r"(words[0]), "r"(words[1]), "r"(last[0]), "r"(last[1]) : "memory");
    else
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(to), "r"(words[0]), "r"(words[1]) : "memory");
}
#else
template <class T> FN Several<T> several_at(const T *from) { return *(const Several<T> *)from; }
template <class T> FN void put_several(T *to, const Several<T> &all) { *(Several<T> *)to = all; }
#endif

template <class T> FN void load(const T *from, const Part &part, float *x) {
    if (part.is_whole) {
        Several<T> all = several_at(from);
#pragma unroll
        for (int v = 0; v < COLUMNS; v++) x[v] = widen(all.x[v]);
        return;
    }
#pragma unroll
    for (int v = 0; v < COLUMNS; v++)
        if (v < part.count) x[v] = widen(from[v * part.apart]);
}

template <class T> FN void store(T *to, const Part &part, const float *x) {
    if (part.is_whole) {
        Several<T> all;
#pragma unroll
        for (int v = 0; v < COLUMNS; v++) all.x[v] = narrow<T>(x[v]);
        put_several(to, all);
        return;
    }
#pragma unroll
    for (int v = 0; v < COLUMNS; v++)
        if (v < part.count) to[v * part.apart] = narrow<T>(x[v]);
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

// The same for a thread's part of a row.
template <class T>
FN void load_gradient(const Items &x, const Rule &r, i64 source, i64 at, const Part &part, float *g) {
    float p[COLUMNS] = {};
    load((const T *)x.grad + source, part, g);
    if (r.weight_decay != 0.0f) load((const T *)x.param + at, part, p);
    float scale = x.scale ? *x.scale : 1.0f;
#pragma unroll
    for (int v = 0; v < COLUMNS; v++) g[v] = oriented(x.scale ? g[v] * scale : g[v], p[v], r);
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

// Raise col_max by a tile's maxima; all of the block's threads must come here together.
FN void raise_columns(const DeviceStep &s, const Tile &tile, const u32 *column_max) {
    int width = s.tiling.lanes * COLUMNS;
    i64 begin = tile.across * width;
    u32 *block_max = shared_maxima();
    for (int i = threadIdx.x; i < width; i += THREADS) block_max[i] = 0;
    __syncthreads();
    for (int v = 0; v < COLUMNS; v++)
        atomicMax(&block_max[tile.column - begin + v * tile.apart], column_max[v]);
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS)
        if (begin + i < s.items.dim) atomicMax(&s.col_max[begin + i], block_max[i]);
    __syncthreads();
}
