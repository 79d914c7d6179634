// Arithmetic that the sources for the host and for the device share, written once.
//
// Everything is float32 and rounded operation by operation (both compilers are told not to fuse a
// multiplication with an addition), so that the implementations agree to the bit wherever the order of
// a sum is defined. Nothing else is included: NVRTC has no standard headers, and on the host a source
// includes <cmath> first.
#pragma once

#include "runtime/abi.h"

// A function for both compilers, always inlined: g++ vectorises the loops that call it.
#if defined(__CUDACC__)
#define FN __device__ __forceinline__
#else
#define FN inline __attribute__((always_inline))
#endif

// ---- 16-bit floats: parameters, gradients and buffers may have them, state never does --------------

struct bf16 { u16 bits; };
struct f16 { u16 bits; };

FN u32 as_bits(float x) {
#if defined(__CUDACC__)
    return __float_as_uint(x);
#else
    u32 bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
#endif
}

FN float as_float(u32 bits) {
#if defined(__CUDACC__)
    return __uint_as_float(bits);
#else
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
#endif
}

FN float widen(float x) { return x; }

FN float widen(bf16 x) { return as_float((u32)x.bits << 16); }

// Exact where a thread makes denormal numbers 0, too: the shifted bits of f16's own would be one.
FN float widen(f16 x) {
    u32 half = x.bits & 0x7fffu, shifted = half << 13;
    float normal = as_float(shifted) * 5.192296858534828e33f;     // 2^112 moves the exponent's bias
    float subnormal = (float)(int)half * 5.9604644775390625e-8f;  // 2^-24
    u32 finite = as_bits(half < 0x400u ? subnormal : normal);
    u32 bits = half >= 0x7c00u ? shifted | 0x7f800000u : finite;
    return as_float(bits | (u32)(x.bits & 0x8000) << 16);
}

template <class T> FN T narrow(float x);

template <> FN float narrow<float>(float x) { return x; }

// To the nearest, ties to even, as torch rounds; NaN stays NaN.
template <> FN bf16 narrow<bf16>(float x) {
    u32 bits = as_bits(x);
    u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    bf16 result = {(u16)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded)};
    return result;
}

template <> FN f16 narrow<f16>(float x) {
    u32 bits = as_bits(x), magnitude = bits & 0x7fffffffu;
    u32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
    u32 subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // 0.5's last bit is f16's
    u32 half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    f16 result = {(u16)(half | ((bits >> 16) & 0x8000u))};
    return result;
}

// ---- comparisons -------------------------------------------------------------------------------------

FN float lesser(float a, float b) { return a < b ? a : b; }  // b if one of them is NaN
FN float greater(float a, float b) { return a > b ? a : b; }

// These are NaN if one argument is, as torch's are: a NaN must not be lost on the way.
FN float or_nan(float x, float a) { return a != a ? a : x; }
FN float smaller(float a, float b) { return or_nan(lesser(a, b), a); }
FN float larger(float a, float b) { return or_nan(greater(a, b), a); }
FN float not_negative(float x) { return x < 0.0f ? 0.0f : x; }

// Magnitudes order as these integers do; infinity and then NaN are above all else.
FN u32 magnitude_bits(float x) { return as_bits(x) & 0x7fffffffu; }
FN u32 larger_bits(u32 a, u32 b) { return a > b ? a : b; }

// ---- scrambling --------------------------------------------------------------------------------------

// Chris Wellons' lowbias32: every input bit flips every output bit with a chance close to one half.
FN u32 mix(u32 x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}
