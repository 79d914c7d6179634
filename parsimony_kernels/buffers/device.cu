// The passes of buffers/ops.py on a GPU; buffers/device.py launches these kernels. runtime/grid.h says on
// what terms.
//
// Mapping of every kernel: a batch of tensors, each of which has some thread blocks of its own. A thread
// block takes WARPS blocks of the tensor's buffers at a time, a warp one of them, as device_blocks.h says,
// and strides over what there is. Shuffles make a block's maximum. Barriers and shared memory are for what
// is to be done, for the histogram, the count of what is taken out, and once for the largest gradient.
//
// A lane writes just the elements that it has read, and a scale is written after a shuffle of what
// all lanes have made of the old one, so a buffer may take the place of the old one that is read.
#include "buffers/device_blocks.h"

// A thread block's part of a tensor: it is one of so many.
struct Share { i64 block, num_blocks; };

// Bring what is to be done with this thread block's tensor into shared memory, and return it.
FN const Accumulation &begin_pass(const Batch &b, Share *share) {
    __shared__ Accumulation pass;
    const Work work = work_of(b, blockIdx.x);
    const u64 *from = (const u64 *)((const Accumulation *)b.steps + work.step);
    for (u32 i = threadIdx.x; i < sizeof(Accumulation) / sizeof(u64); i += THREADS) ((u64 *)&pass)[i] = from[i];
    __syncthreads();
    const i64 begin = work.step ? b.ends[work.step - 1] : 0;
    share->block = work.block;
    share->num_blocks = b.ends[work.step] - begin;
    return pass;
}

#define PASS_KERNEL(NAME, FUNCTION)                            \
    STREAMING_KERNEL(NAME, Batch) {                            \
        Share share;                                           \
        const Accumulation &pass = begin_pass(s, &share);      \
        (FUNCTION)(pass, share);                               \
    }

// ---- selecting ---------------------------------------------------------------------------------

const u32 MOST_COUNTED = 1u << 31;  // or little more: the count must not start again at 0

// Count a warp's `total` in the report, with one atomic for the thread block if it has any; return where
// the warp may list. turn: alternately 0 and 1, so that a warp may be ahead of one that still reads. All
// threads of a thread block must come here together.
FN u32 reserve(const Accumulation &s, u32 total, u32 turn) {
    __shared__ u32 totals[2][WARPS], begin[2];
    const u32 warp = threadIdx.x / LANES;
    if (lane_of() == 0) totals[turn][warp] = total;
    __syncthreads();
    u32 before = 0, all = 0;
    for (u32 w = 0; w < WARPS; w++) {
        before += w < warp ? totals[turn][w] : 0;
        all += totals[turn][w];
    }
    if (all == 0) return 0;
    if (threadIdx.x == 0) {
        u32 count = *(volatile u32 *)&s.report[1];
        begin[turn] = count < MOST_COUNTED ? atomicAdd(&s.report[1], all) : count;
    }
    __syncthreads();
    return begin[turn] + before;
}

// List which of a block's elements are above, as far as there is room; return this lane's, as bits. All
// threads of a thread block must come here together.
FN u32 take(const Accumulation &s, const Span &at, u32 turn, const float *u, const float *v) {
    u32 above[EACH], total = 0, taken = 0;
    for (int k = 0; k < EACH; k++) {
        above[k] = __ballot_sync(WHOLE_WARP, is_above(v[k], s.threshold));
        total += __popc(above[k]);
    }
    u32 begin = reserve(s, total, turn), lane = lane_of();
    if (total == 0) return 0;
    for (int k = 0; k < EACH; k++) {
        i64 slot = (i64)begin + __popc(above[k] & ((1u << lane) - 1));
        begin += __popc(above[k]);
        if (!(above[k] >> lane & 1) || slot >= s.capacity) continue;
        s.indices[slot] = s.first + element(at, k);
        s.values[slot] = v[k];
        if (s.velocities) s.velocities[slot] = u[k];
        taken |= 1u << k;
    }
    return taken;
}

FN void sample(const Accumulation &s, const Span &at, const float *v, u32 *bins) {
    if ((u32)at.block % s.sample_every != s.sample_first) return;
    for (int k = 0; k < EACH; k++)
        if (element(at, k) < s.numel) atomicAdd(&bins[magnitude_bits(v[k]) >> BIN_SHIFT], 1u);
}

// These three are for all threads of a thread block together. Returns shared memory.
FN u32 *begin_bins() {
    __shared__ u32 bins[BINS];
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) bins[bin] = 0;
    __syncthreads();
    return bins;
}

FN void end_bins(const Accumulation &s, const u32 *bins) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
        if (bins[bin]) atomicAdd(&s.report[2 + bin], bins[bin]);
}

FN void report_largest(const Accumulation &s, u32 largest) {
    __shared__ u32 maxima[WARPS];
    largest = max_over_lanes(largest, LANES);
    if (lane_of() == 0) maxima[threadIdx.x / LANES] = largest;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < WARPS; w++) largest = larger_bits(largest, maxima[w]);
    if (largest > *(volatile u32 *)&s.report[0]) atomicMax(&s.report[0], largest);
}

// ---- the passes --------------------------------------------------------------------------------

// Every buffer is read or written once. G, V and U are how gradient, residual and velocity are stored, the
// old as the new; ANY for what the argument says. Atomics: for each thread block a maximum of |x| as bits
// (infinity, then NaN, is above all); where SELECTS, those of `reserve`, `sample` and `end_bins`, which add
// integers. Thread order reaches nothing but the order of the list, and which entries are in it where more
// are above than there is room for.
template <int G, int V, int U, bool SELECTS>
FN void accumulate_blocks(const Accumulation &s, Share share, u32 *bins) {
    const Correction &c = s.correction;
    const bool has_velocity = U == ANY ? s.velocity.storage != STORAGE_ABSENT : U != STORAGE_ABSENT;
    const bool is_wide = is_aligned(s);
    const float scale = s.scale ? *s.scale : 1.0f;
    u32 largest = 0, turn = 0;
    for (i64 first = share.block * WARPS; first * BLOCK < s.numel; first += share.num_blocks * WARPS) {
        const Span at = span_of(first + threadIdx.x / LANES, s.numel, is_wide);
        Held<G> grad;
        Held<U> old_u;
        Held<V> old_v;
        grad.load(s.grad, at);
        old_u.load(s.old_velocity, at);
        old_v.load(s.old_residual, at);
        float u[EACH], v[EACH];
        for (int k = 0; k < EACH; k++) {
            float x = grad[k] * scale;
            largest = larger_bits(largest, magnitude_bits(x));
            u[k] = has_velocity ? new_velocity(old_u[k], x, c) : x;
            v[k] = old_v[k] + (has_velocity ? change(u[k], x, c) : change(x, c));
        }
        u32 taken = 0;
        if (SELECTS) {
            sample(s, at, v, bins);
            taken = take(s, at, turn, u, v);
        }
        if (has_velocity) store<U>(s.velocity, at, s.velocity_key, u, s.velocities ? taken : 0);
        store<V>(s.residual, at, s.residual_key, v, taken);
        turn ^= 1;
    }
    report_largest(s, largest);
}

// Entries are selected in the pass that accumulates.
template <int G, int V, int U> FN void accumulate_and_select(const Accumulation &s, Share share) {
    u32 *bins = begin_bins();
    accumulate_blocks<G, V, U, true>(s, share, bins);
    end_bins(s, bins);
}

FN void accumulate_only(const Accumulation &s, Share share) {
    accumulate_blocks<ANY, ANY, ANY, false>(s, share, (u32 *)0);
}

#define SELECTING_KERNEL(SUFFIX, G, V, U) PASS_KERNEL(accumulate_select##SUFFIX, (accumulate_and_select<G, V, U>))
#define FOR_GRADIENTS_OF(SUFFIX, G)                                                 \
    SELECTING_KERNEL(SUFFIX##_float32, G, STORAGE_FLOAT32, STORAGE_ABSENT)          \
    SELECTING_KERNEL(SUFFIX##_bfloat16, G, STORAGE_BFLOAT16, STORAGE_ABSENT)        \
    SELECTING_KERNEL(SUFFIX##_blocks, G, STORAGE_BLOCKS, STORAGE_ABSENT)            \
    SELECTING_KERNEL(SUFFIX##_float32_velocity, G, STORAGE_FLOAT32, STORAGE_FLOAT32)    \
    SELECTING_KERNEL(SUFFIX##_bfloat16_velocity, G, STORAGE_BFLOAT16, STORAGE_BFLOAT16) \
    SELECTING_KERNEL(SUFFIX##_blocks_velocity, G, STORAGE_BLOCKS, STORAGE_BLOCKS)

// What is common has kernels of its own, in which nothing depends on a kind of storage.
PASS_KERNEL(accumulate, accumulate_only)
SELECTING_KERNEL(, ANY, ANY, ANY)
FOR_GRADIENTS_OF(_float32, STORAGE_FLOAT32)
FOR_GRADIENTS_OF(_bfloat16, STORAGE_BFLOAT16)

// The residual is left as it was before the step. Atomics as above.
template <int G> FN void accumulate_lagging(const Accumulation &s, Share share) {
    u32 *bins = begin_bins();
    const bool is_wide = is_aligned(s);
    const float scale = s.scale ? *s.scale : 1.0f;
    u32 largest = 0, turn = 0;
    for (i64 first = share.block * WARPS; first * BLOCK < s.numel; first += share.num_blocks * WARPS) {
        const Span at = span_of(first + threadIdx.x / LANES, s.numel, is_wide);
        Held<G> grad;
        Held<STORAGE_FLOAT32> old_u, old;
        grad.load(s.grad, at);
        old_u.load(s.old_velocity, at);
        old.load(s.old_residual, at);
        float u[EACH], v[EACH], old_v[EACH];
        for (int k = 0; k < EACH; k++) {
            float x = grad[k] * scale;
            largest = larger_bits(largest, magnitude_bits(x));
            old_v[k] = s.lagged ? old[k] + old_u[k] : old[k];
            u[k] = new_velocity(old_u[k], x, s.correction);
            v[k] = old_v[k] + u[k];
        }
        sample(s, at, v, bins);
        u32 taken = take(s, at, turn, u, v);
        store<STORAGE_FLOAT32>(s.velocity, at, 0, u, taken);
        store<STORAGE_FLOAT32>(s.residual, at, 0, old_v, 0);
        turn ^= 1;
    }
    report_largest(s, largest);
    end_bins(s, bins);
}

PASS_KERNEL(accumulate_lagging_float32, accumulate_lagging<STORAGE_FLOAT32>)
PASS_KERNEL(accumulate_lagging_bfloat16, accumulate_lagging<STORAGE_BFLOAT16>)
PASS_KERNEL(accumulate_lagging, accumulate_lagging<ANY>)

// From what is stored: the residual is read, and what is taken out is written; velocities of blocks
// without any are not read. Atomics as above.
FN void select_from_stored(const Accumulation &s, Share share) {
    u32 *bins = begin_bins(), turn = 0;
    const bool is_wide = is_aligned(s);
    for (i64 first = share.block * WARPS; first * BLOCK < s.numel; first += share.num_blocks * WARPS) {
        const Span at = span_of(first + threadIdx.x / LANES, s.numel, is_wide);
        Held<ANY> u, v;
        bool is_any = false;
        v.load(s.residual, at);
        if (s.lags) {
            u.load(s.velocity, at);
            for (int k = 0; k < EACH; k++) v.x[k] += u[k];
        }
        sample(s, at, v.x, bins);
        for (int k = 0; k < EACH; k++) is_any = is_any || is_above(v[k], s.threshold);
        if (!s.lags && s.velocities && __ballot_sync(WHOLE_WARP, is_any)) u.load(s.velocity, at);
        u32 taken = take(s, at, turn, u.x, v.x);
        for (int k = 0; k < EACH; k++) {
            if (!(taken >> k & 1)) continue;
            if (!s.lags) clear(s.residual, element(at, k));
            if (s.velocities) clear(s.velocity, element(at, k));
        }
        turn ^= 1;
    }
    end_bins(s, bins);
}

PASS_KERNEL(select_stored, select_from_stored)

// Flat over the positions. No atomics.
KERNEL(put_values, Puttings) {
    const i64 end = s.puttings[s.count - 1].end;
    for (i64 j = flat_start(); j < end; j += flat_stride())
        put(s, j, s.puttings[part_with(j, s.puttings, s.count)]);
}
