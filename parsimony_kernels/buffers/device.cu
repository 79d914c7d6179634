// The passes of buffers/ops.py on a GPU; buffers/device.py launches these kernels. runtime/grid.h says on
// what terms.
//
// Mapping of every kernel: one warp a block of the buffer, BLOCK elements, those that share a scale
// in 8-bit storage; a lane has EACH of them, LANES apart, so that accesses coalesce whatever the
// alignment, and all of a lane's reads of one buffer are under way together. A block's maximum
// needs shuffles only; shared memory and barriers are for the histogram. Warps stride over the
// blocks.
//
// A lane writes just the elements that it has read, and a scale is written after a shuffle of what
// all lanes have made of the old one, so a buffer may take the place of the old one that is read.
#include "buffers/entry.h"
#include "runtime/grid.h"

const int LANES = 32, EACH = BLOCK / LANES;

// ---- a block's elements ------------------------------------------------------------------------

FN i64 first_block() { return flat_start() / LANES; }
FN i64 block_stride() { return flat_stride() / LANES; }
FN int lane_of() { return threadIdx.x % LANES; }

// Beyond the end elements are 0, which is no maximum and never selected.
template <class T> FN void load_as(const Stored &from, i64 block, i64 numel, float *x) {
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        i64 i = block * BLOCK + lane_of() + k * LANES;
        x[k] = i < numel ? widen(((const T *)from.values)[i]) : 0.0f;
    }
}

FN void load(const Stored &from, i64 block, i64 numel, float *x) {
    switch (from.storage) {
        case STORAGE_FLOAT32: return load_as<float>(from, block, numel, x);
        case STORAGE_BFLOAT16: return load_as<bf16>(from, block, numel, x);
        case STORAGE_FLOAT16: return load_as<f16>(from, block, numel, x);
        case STORAGE_BLOCKS: {
            float scale = from.scales[block];
            load_as<signed char>(from, block, numel, x);
            for (int k = 0; k < EACH; k++) x[k] *= scale;
            return;
        }
        default:
            for (int k = 0; k < EACH; k++) x[k] = 0.0f;
    }
}

// All of the warp must come here together.
FN float scale_of(const float *x) {
    u32 largest = 0;
    for (int k = 0; k < EACH; k++) largest = larger_bits(largest, magnitude_bits(x[k]));
    return scale_of_block(max_over_lanes(largest, LANES));
}

// Bit k of `zeroed`: the lane's k-th element becomes 0. The scale is that of the elements as they are.
FN void store(const Stored &to, i64 block, i64 numel, i64 key, const float *x, u32 zeroed) {
    const u32 random = folded(key);
    bool is_blocks = to.storage == STORAGE_BLOCKS;
    float scale = is_blocks ? scale_of(x) : 1.0f;
    if (is_blocks && lane_of() == 0) to.scales[block] = scale;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        i64 i = block * BLOCK + lane_of() + k * LANES;
        if (i >= numel) continue;
        float value = zeroed >> k & 1 ? 0.0f : x[k];
        if (to.storage == STORAGE_FLOAT32) {
            ((float *)to.values)[i] = value;
        } else if (is_blocks) {
            ((signed char *)to.values)[i] = stochastic_code(value, scale, random_bits(i, random));
        } else {
            ((bf16 *)to.values)[i] = stochastic_bf16(value, random_bits(i, random));
        }
    }
}

// ---- selecting ---------------------------------------------------------------------------------

const u32 MOST_COUNTED = 1u << 31;  // or little more: the count must not start again at 0

// List which of a block's elements are above, as far as there is room; return this lane's, as bits.
// One atomic for a block that has any: it counts, and says where to list. All of the warp must come
// here together.
FN u32 take(const Accumulation &s, i64 block, const float *u, const float *v) {
    u32 above[EACH], total = 0, taken = 0;
    for (int k = 0; k < EACH; k++) {
        above[k] = __ballot_sync(WHOLE_WARP, is_above(v[k], s.threshold));
        total += __popc(above[k]);
    }
    if (total == 0) return 0;
    u32 at = 0, lane = lane_of();
    if (lane == 0) {
        at = *(volatile u32 *)&s.report[1];
        at = at < MOST_COUNTED ? atomicAdd(&s.report[1], total) : at;
    }
    at = max_over_lanes(at, LANES);  // the other lanes' are 0
    for (int k = 0; k < EACH; k++) {
        i64 slot = at + __popc(above[k] & ((1u << lane) - 1));
        at += __popc(above[k]);
        if (!(above[k] >> lane & 1) || slot >= s.capacity) continue;
        s.indices[slot] = block * BLOCK + lane + k * LANES;
        s.values[slot] = v[k];
        if (s.velocities) s.velocities[slot] = u[k];
        taken |= 1u << k;
    }
    return taken;
}

FN void sample(const Accumulation &s, i64 block, const float *v, u32 *bins) {
    if ((u32)block % s.sample_every != s.sample_first) return;
    for (int k = 0; k < EACH; k++)
        if (block * BLOCK + lane_of() + k * LANES < s.numel)
            atomicAdd(&bins[magnitude_bits(v[k]) >> BIN_SHIFT], 1u);
}

// These two are for all threads of a thread block together. Returns shared memory.
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

// ---- the passes --------------------------------------------------------------------------------

// Every buffer is read or written once. Atomics: for each warp a maximum of |x| as bits (infinity,
// then NaN, is above all); where SELECTS, those of `take`, `sample` and `end_bins`, which add
// integers. Thread order reaches nothing but the order of the list, and which entries are in it
// where more are above than there is room for.
template <bool SELECTS> FN void accumulate_blocks(const Accumulation &s, u32 *bins) {
    const Correction &c = s.correction;
    bool has_velocity = s.velocity.storage != STORAGE_ABSENT;
    float scale = s.scale ? *s.scale : 1.0f;
    u32 largest = 0;
    for (i64 block = first_block(); block * BLOCK < s.numel; block += block_stride()) {
        float u[EACH], v[EACH], old[EACH];
        load(s.grad, block, s.numel, u);
        for (int k = 0; k < EACH; k++) {
            u[k] *= scale;
            v[k] = change(u[k], c);
            largest = larger_bits(largest, magnitude_bits(u[k]));
        }
        if (has_velocity) {
            load(s.old_velocity, block, s.numel, old);
            for (int k = 0; k < EACH; k++) {
                float x = u[k];
                u[k] = new_velocity(old[k], x, c);
                v[k] = change(u[k], x, c);
            }
        }
        load(s.old_residual, block, s.numel, old);
        for (int k = 0; k < EACH; k++) v[k] = old[k] + v[k];
        u32 taken = 0;
        if (SELECTS) {
            sample(s, block, v, bins);
            taken = take(s, block, u, v);
        }
        if (has_velocity) {
            u32 masked = s.velocities ? taken : 0;
            store(s.velocity, block, s.numel, s.velocity_key, u, masked);
        }
        store(s.residual, block, s.numel, s.residual_key, v, taken);
    }
    largest = max_over_lanes(largest, LANES);
    if (lane_of() == 0) atomicMax(&s.report[0], largest);
}

STREAMING_KERNEL(accumulate, Accumulation) { accumulate_blocks<false>(s, (u32 *)0); }

STREAMING_KERNEL(accumulate_select, Accumulation) {
    u32 *bins = begin_bins();
    accumulate_blocks<true>(s, bins);
    end_bins(s, bins);
}

// From what is stored: the residual is read, and what is taken out is written; velocities of blocks
// without any are not read. Atomics as above.
STREAMING_KERNEL(select_stored, Accumulation) {
    u32 *bins = begin_bins();
    for (i64 block = first_block(); block * BLOCK < s.numel; block += block_stride()) {
        float u[EACH], v[EACH];
        bool is_any = false;
        load(s.residual, block, s.numel, v);
        sample(s, block, v, bins);
        for (int k = 0; k < EACH; k++) is_any = is_any || is_above(v[k], s.threshold);
        if (!__ballot_sync(WHOLE_WARP, is_any)) continue;
        if (s.velocities) load(s.velocity, block, s.numel, u);
        u32 taken = take(s, block, u, v);
        for (int k = 0; k < EACH; k++) {
            i64 i = block * BLOCK + lane_of() + k * LANES;
            if (!(taken >> k & 1)) continue;
            clear(s.residual, i);
            if (s.velocities) clear(s.velocity, i);
        }
    }
    end_bins(s, bins);
}
