// The passes of parsimony_kernels/buffers/ops.py on a GPU; parsimony_kernels/buffers/device.py launches these kernels.
//
// To the bit what parsimony_kernels/buffers/reference.py says, on the terms of device.cu, with which it is
// one translation unit, so that both are compiled and launched alike.
//
// Mapping of every kernel: one warp a block of the buffer, BLOCK elements, those that share a scale
// in 8-bit storage; a lane has EACH of them, LANES apart, so that accesses coalesce whatever the
// alignment, and all of a lane's reads of one buffer are under way together. A block's maximum
// needs shuffles only; shared memory and barriers are for the histogram. Warps stride over the
// blocks, so any grid is correct; sizes are limited by nothing but memory.
//
// A lane writes just the elements that it has read, and a scale is written after a shuffle of what
// all lanes have made of the old one, so a buffer may take the place of the old one that is read.
#include "step/device.cu"

const int BLOCK = 256;
const int LANES = 32, EACH = BLOCK / LANES;
const float LEVELS = 127.0f, MIN_SCALE = 1e-30f;
const int BIN_SHIFT = 20, BINS = 1 << (31 - BIN_SHIFT);

// ---- what device_buffers.py fills in -----------------------------------------------------------

enum Storage { STORED_NOWHERE, STORED_F32, STORED_BF16, STORED_F16, STORED_BLOCKS };

struct Stored {
    void *values;
    float *scales;  // of blocks
    int storage;
};

// Mirrors operands.Correction.
struct Correction { float u_decay, u_gain, v_from_u, v_gain; };

struct Accumulation {
    Stored grad, residual, old_residual, velocity, old_velocity;  // residual alone is always there
    i64 numel, residual_key, velocity_key;
    const float *scale;          // null: 1
    u32 *report;                 // max |x| as bits, count, BINS counts; 0 before
    i64 *indices;                // these three: what is taken out, with `capacity` places
    float *values, *velocities;  // velocities null: they stay
    i64 capacity;
    u32 sample_every, sample_first;
    float threshold;
    Correction correction;
};

// ---- a block's elements ------------------------------------------------------------------------

FN i64 first_block() { return flat_start() / LANES; }
FN i64 block_stride() { return flat_stride() / LANES; }
FN int lane_of() { return threadIdx.x % LANES; }

FN float widen(signed char x) { return (float)x; }

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
        case STORED_F32: return load_as<float>(from, block, numel, x);
        case STORED_BF16: return load_as<bf16>(from, block, numel, x);
        case STORED_F16: return load_as<f16>(from, block, numel, x);
        case STORED_BLOCKS: {
            float scale = from.scales[block];
            load_as<signed char>(from, block, numel, x);
            for (int k = 0; k < EACH; k++) x[k] *= scale;
            return;
        }
        default:
            for (int k = 0; k < EACH; k++) x[k] = 0.0f;
    }
}

FN u32 magnitude_bits(float x) { return as_bits(x) & 0x7fffffffu; }

// All of the warp must come here together.
FN float scale_of_block(const float *x) {
    u32 largest = 0;
    for (int k = 0; k < EACH; k++) largest = larger_bits(largest, magnitude_bits(x[k]));
    float scale = as_float(max_over_lanes(largest, LANES)) / LEVELS;
    return scale < MIN_SCALE ? MIN_SCALE : scale;  // NaN stays
}

// Bit k of `zeroed`: the lane's k-th element becomes 0. The scale is that of the elements as they are.
FN void store(const Stored &to, i64 block, i64 numel, i64 key, const float *x, u32 zeroed) {
    const u32 random = folded(key);
    bool is_blocks = to.storage == STORED_BLOCKS;
    float scale = is_blocks ? scale_of_block(x) : 1.0f;
    if (is_blocks && lane_of() == 0) to.scales[block] = scale;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        i64 i = block * BLOCK + lane_of() + k * LANES;
        if (i >= numel) continue;
        float value = zeroed >> k & 1 ? 0.0f : x[k];
        if (to.storage == STORED_F32) {
            ((float *)to.values)[i] = value;
        } else if (is_blocks) {
            ((signed char *)to.values)[i] = stochastic_code(value, scale, random_bits(i, random));
        } else {
            ((bf16 *)to.values)[i] = stochastic_bf16(value, random_bits(i, random));
        }
    }
}

FN void clear(const Stored &of, i64 i) {
    if (of.storage == STORED_F32) ((float *)of.values)[i] = 0.0f;
    if (of.storage == STORED_BF16) ((bf16 *)of.values)[i].bits = 0;
    if (of.storage == STORED_BLOCKS) ((signed char *)of.values)[i] = 0;
}

// ---- selecting ---------------------------------------------------------------------------------

const u32 MOST_COUNTED = 1u << 31;  // or little more: the count must not start again at 0

FN bool is_above(const Accumulation &s, float v) { return fabsf(v) >= s.threshold && v != 0.0f; }

// List which of a block's elements are above, as far as there is room; return this lane's, as bits.
// One atomic for a block that has any: it counts, and says where to list. All of the warp must come
// here together.
FN u32 take(const Accumulation &s, i64 block, const float *u, const float *v) {
    u32 above[EACH], total = 0, taken = 0;
    for (int k = 0; k < EACH; k++) {
        above[k] = __ballot_sync(WHOLE_WARP, is_above(s, v[k]));
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
        i64 place = at + __popc(above[k] & ((1u << lane) - 1));
        at += __popc(above[k]);
        if (!(above[k] >> lane & 1) || place >= s.capacity) continue;
        s.indices[place] = block * BLOCK + lane + k * LANES;
        s.values[place] = v[k];
        if (s.velocities) s.velocities[place] = u[k];
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
    bool has_velocity = s.velocity.storage != STORED_NOWHERE;
    float scale = s.scale ? *s.scale : 1.0f;
    u32 largest = 0;
    for (i64 block = first_block(); block * BLOCK < s.numel; block += block_stride()) {
        float u[EACH], v[EACH], old[EACH];
        load(s.grad, block, s.numel, u);
        for (int k = 0; k < EACH; k++) {
            u[k] *= scale;
            v[k] = u[k] * c.v_gain;
            largest = larger_bits(largest, magnitude_bits(u[k]));
        }
        if (has_velocity) {
            load(s.old_velocity, block, s.numel, old);
            for (int k = 0; k < EACH; k++) {
                u[k] = old[k] * c.u_decay + u[k] * c.u_gain;
                v[k] = u[k] * c.v_from_u + v[k];
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
        for (int k = 0; k < EACH; k++) is_any = is_any || is_above(s, v[k]);
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
