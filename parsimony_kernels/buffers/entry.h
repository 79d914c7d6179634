// How a block of a buffer is stored, and one entry's part of a pass over it: for the host and the device.
#pragma once

#include "runtime/arithmetic.h"

// ---- what a gradient adds ----------------------------------------------------------------------------

FN float new_velocity(float old, float x, const Correction &c) { return old * c.u_beta + x * c.u_gain; }

// What is added to the residual, u being the new velocity. (Without one the first product is left out:
// 0 + -0 is 0, not -0.)
FN float change(float u, float x, const Correction &c) { return u * c.v_from_u + x * c.v_gain; }
FN float change(float x, const Correction &c) { return x * c.v_gain; }

FN bool is_above(float v, float threshold) { return (fabsf(v) >= threshold) & (v != 0.0f); }

// ---- storage -----------------------------------------------------------------------------------------

FN float widen(signed char x) { return (float)x; }

// The scale of a block, by the bits of its largest magnitude. NaN stays.
FN float scale_of_block(u32 largest) {
    float scale = as_float(largest) / LEVELS;
    return scale < MIN_SCALE ? MIN_SCALE : scale;
}

// Stochastic rounding draws 32 bits for each element, from its number and a key. The key's two halves are
// folded into one once for a buffer, so that each element costs one `mix`.
FN u32 folded(i64 key) { return mix((u32)(u64)key ^ mix((u32)((u64)key >> 32))); }

FN u32 random_bits(i64 element, u32 folded_key) { return mix((u32)element ^ folded_key); }

// Round to one of the two neighbours, but never to infinity: the lower 16 bits, as a fraction of the step,
// are the odds of the one away from 0.
FN bf16 stochastic_bf16(float x, u32 random) {
    u32 bits = as_bits(x), down = bits >> 16, away = (bits + (random & 0xffffu)) >> 16;
    u32 chosen = (away & 0x7f80u) == 0x7f80u ? down : away;
    bf16 result = {(u16)((bits & 0x7fffffffu) > 0x7f800000u ? down | 0x40u : chosen)};
    return result;
}

// Round x / scale to one of the two neighbouring integers. A value that was decoded from a code, code *
// scale, always becomes that code again: the draw is never so close to 0 or 1 that the rounding of the
// quotient could matter. NaN becomes -127, as converting it is not defined. (The exchange has seen the NaN
// in the largest |gradient| by then, and undoes the step.)
FN signed char stochastic_code(float x, float scale, u32 random) {
    float drawn = (float)(int)(random >> 17) * 3.0517578125e-5f + 1.52587890625e-5f;  // (k + 1/2) / 2^15
    float code = floorf(x / scale + drawn);
    return (signed char)(int)lesser(greater(code, -127.0f), 127.0f);
}

// Write the j-th value, of this buffer.
FN void put(const Puttings &p, i64 j, const Putting &of) {
    i64 i = p.positions[j] - of.first;
    float x = p.values ? p.values[j] : 0.0f;
    const Stored &to = of.buffer;
    if (to.storage == STORAGE_FLOAT32) ((float *)to.values)[i] = x;
    if (to.storage == STORAGE_BFLOAT16) ((bf16 *)to.values)[i] = stochastic_bf16(x, random_bits(i, folded(of.key)));
    if (to.storage == STORAGE_BLOCKS)
        ((signed char *)to.values)[i] = stochastic_code(x, to.scales[i / BLOCK], random_bits(i, folded(of.key)));
}

FN void clear(const Stored &of, i64 i) {
    if (of.storage == STORAGE_FLOAT32) ((float *)of.values)[i] = 0.0f;
    if (of.storage == STORAGE_BFLOAT16) ((bf16 *)of.values)[i].bits = 0;
    if (of.storage == STORAGE_BLOCKS) ((signed char *)of.values)[i] = 0;
}
