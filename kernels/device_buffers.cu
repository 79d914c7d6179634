// The passes of kernels/buffers.py on a GPU; kernels/device_buffers.py launches these kernels.
//
// To the bit what kernels/reference_buffers.py says, on the terms of device.cu, with which it is
// one translation unit, so that both are compiled and launched alike.
//
// Mapping of every kernel: one warp a block of the buffer, BLOCK elements, those that share a scale
// in 8-bit storage; a lane has EACH of them, LANES apart, so that accesses coalesce whatever the
// alignment, and all of a lane's reads of one buffer are under way together. A block's maximum
// needs shuffles only: no shared memory, no barriers. Warps stride over the blocks, so any grid is
// correct; sizes are limited by nothing but memory.
//
// A lane writes just the elements that it has read, and a scale is written after a shuffle of what
// all lanes have made of the old one, so a buffer may take the place of the old one that is read.
#include "device.cu"

const int BLOCK = 256;
const int LANES = 32, EACH = BLOCK / LANES;
const float LEVELS = 127.0f, MIN_SCALE = 1e-30f;

// ---- what device_buffers.py fills in -----------------------------------------------------------

enum Storage { STORED_NOWHERE, STORED_F32, STORED_BF16, STORED_F16, STORED_BLOCKS };

struct Stored {
    void *values;
    float *scales;  // of blocks
    int storage;
};

// Mirrors kernels.operands.Correction.
struct Correction { float u_decay, u_gain, v_from_u, v_gain; };

struct Accumulation {
    Stored grad, residual, old_residual, velocity, old_velocity;  // the last three may be nowhere
    i64 numel, residual_key, velocity_key;
    const float *scale;  // null: 1
    u32 *largest;        // max |x|, as bits; 0 before
    Correction correction;
};

struct Selection {
    Stored buffer;
    i64 numel;
    int *counts;      // of each block
    const i64 *ends;  // running sums of counts
    i64 *indices;
    float threshold;
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

FN void store(const Stored &to, i64 block, i64 numel, i64 key, const float *x) {
    const u32 random = folded(key);
    bool is_blocks = to.storage == STORED_BLOCKS;
    float scale = is_blocks ? scale_of_block(x) : 1.0f;
    if (is_blocks && lane_of() == 0) to.scales[block] = scale;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        i64 i = block * BLOCK + lane_of() + k * LANES;
        if (i >= numel) continue;
        if (to.storage == STORED_F32) {
            ((float *)to.values)[i] = x[k];
        } else if (is_blocks) {
            ((signed char *)to.values)[i] = stochastic_code(x[k], scale, random_bits(i, random));
        } else {
            ((bf16 *)to.values)[i] = stochastic_bf16(x[k], random_bits(i, random));
        }
    }
}

// ---- the passes --------------------------------------------------------------------------------

// Every buffer is read or written once. One atomic maximum for each warp, of |x| as bits: infinity,
// then NaN, is above all. Thread order reaches no result.
STREAMING_KERNEL(accumulate, Accumulation) {
    const Correction &c = s.correction;
    float scale = s.scale ? *s.scale : 1.0f;
    u32 largest = 0;
    for (i64 block = first_block(); block * BLOCK < s.numel; block += block_stride()) {
        float x[EACH], old[EACH], change[EACH];
        load(s.grad, block, s.numel, x);
        for (int k = 0; k < EACH; k++) {
            x[k] *= scale;
            change[k] = x[k] * c.v_gain;
            largest = larger_bits(largest, magnitude_bits(x[k]));
        }
        if (s.velocity.storage != STORED_NOWHERE) {
            load(s.old_velocity, block, s.numel, old);
            for (int k = 0; k < EACH; k++) {
                x[k] = old[k] * c.u_decay + x[k] * c.u_gain;  // now u
                change[k] = x[k] * c.v_from_u + change[k];
            }
            store(s.velocity, block, s.numel, s.velocity_key, x);
        }
        load(s.old_residual, block, s.numel, old);
        for (int k = 0; k < EACH; k++) change[k] = old[k] + change[k];
        store(s.residual, block, s.numel, s.residual_key, change);
    }
    largest = max_over_lanes(largest, LANES);
    if (lane_of() == 0) atomicMax(s.largest, largest);
}

// Bit by lane: whose k-th element is selected. All of the warp must come here together.
FN u32 lanes_above(const Selection &s, float x) {
    return __ballot_sync(WHOLE_WARP, fabsf(x) >= s.threshold && x != 0.0f);
}

// How many elements of each block are selected. No atomics; any thread order.
STREAMING_KERNEL(select_count, Selection) {
    for (i64 block = first_block(); block * BLOCK < s.numel; block += block_stride()) {
        float x[EACH];
        load(s.buffer, block, s.numel, x);
        int count = 0;
        for (int k = 0; k < EACH; k++) count += __popc(lanes_above(s, x[k]));
        if (lane_of() == 0) s.counts[block] = count;
    }
}

// Which they are; blocks without any are not read again. No atomics; any thread order.
STREAMING_KERNEL(select_write, Selection) {
    for (i64 block = first_block(); block * BLOCK < s.numel; block += block_stride()) {
        if (s.counts[block] == 0) continue;
        float x[EACH];
        load(s.buffer, block, s.numel, x);
        i64 at = s.ends[block] - s.counts[block];
        for (int k = 0; k < EACH; k++) {
            u32 above = lanes_above(s, x[k]), before = (1u << lane_of()) - 1;
            if (above >> lane_of() & 1)
                s.indices[at + __popc(above & before)] = block * BLOCK + lane_of() + k * LANES;
            at += __popc(above);
        }
    }
}
