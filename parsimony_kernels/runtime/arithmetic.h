// The arithmetic and the hash, written once: the sources for the host and for the device include it.
//
// Everything is float32 and rounded operation by operation (both compilers are told not to fuse a
// multiplication with an addition), so that the implementations agree to the bit wherever the order of
// a sum is defined. Nothing is included here: NVRTC has no standard headers.
#pragma once

#if defined(__CUDACC__)
#define FN __device__ __forceinline__
#else
#define FN inline __attribute__((always_inline))
#endif

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// ---- 16-bit floats: parameters and gradients may have them, state never does ----------------------

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

// ---- the hash ------------------------------------------------------------------------------------

// Chris Wellons' lowbias32: every input bit flips every output bit with a chance close to one half.
FN u32 mix(u32 x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

// The low bit is the sign, the high bits choose the bucket: see bucket_of and sign_of.
FN u32 hash_row(i64 row, i64 seed) {
    return mix(mix((u32)row ^ (u32)(u64)seed) ^ (u32)((u64)seed >> 32));
}

// What stochastic rounding draws for an element: one mix each, of a key that is folded once.
FN u32 folded(i64 key) { return mix((u32)(u64)key ^ mix((u32)((u64)key >> 32))); }

FN u32 random_bits(i64 element, u32 folded_key) { return mix((u32)element ^ folded_key); }

FN i64 bucket_of(u32 hash, i64 width) { return (i64)(((u64)hash * (u64)width) >> 32); }

FN float sign_of(u32 hash) { return (hash & 1) ? -1.0f : 1.0f; }

// ---- estimates from a sketch's `depth` buckets -----------------------------------------------------

FN float lesser(float a, float b) { return a < b ? a : b; }  // b if one of them is NaN
FN float greater(float a, float b) { return a > b ? a : b; }

// NaN if one of them is, as torch's: what is not finite must not be lost on the way.
FN float or_nan(float x, float a) { return a != a ? a : x; }
FN float smaller(float a, float b) { return or_nan(lesser(a, b), a); }
FN float larger(float a, float b) { return or_nan(greater(a, b), a); }
FN float not_negative(float x) { return x < 0.0f ? 0.0f : x; }

FN void order(float &a, float &b) {
    float low = lesser(a, b);
    b = greater(a, b);
    a = low;
}

template <int DEPTH> FN float minimum_of(const float *x) {
    float least = x[0];
    for (int j = 1; j < DEPTH; j++) least = smaller(x[j], least);
    return least;
}

// Of numbers; an even depth takes the mean of the two in the middle.
template <int DEPTH> FN float middle_of(const float *x) {
    if (DEPTH == 1) return x[0];
    if (DEPTH == 2) return (x[0] + x[1]) * 0.5f;
    float a = x[0], b = x[1], c = x[2];
    if (DEPTH == 3) {
        order(a, b);
        return greater(a, lesser(b, c));
    }
    float d = x[DEPTH > 3 ? 3 : 0];
    order(a, b);
    order(c, d);
    float low = greater(a, c), high = lesser(b, d);  // of four, the two in the middle
    if (DEPTH == 4) return (low + high) * 0.5f;
    float e = x[DEPTH > 4 ? 4 : 0];
    order(low, high);
    return greater(low, lesser(high, e));
}

// NaN if one of them is.
template <int DEPTH> FN float median_of(const float *x) {
    float median = middle_of<DEPTH>(x);
    for (int j = 0; j < DEPTH; j++) median = or_nan(median, x[j]);
    return median;
}

// ---- the rule --------------------------------------------------------------------------------------

// Mirrors operands.Rule field by field; all floats.
struct Rule {
    float lr, decay, weight_decay, sign;
    float first_beta, first_gain, first_decay, first_scale, first_doubt;
    float second_beta, second_gain, second_decay, second_scale;
    float eps_inside, eps_outside, largest_quotient;
};

enum First { FIRST_NONE, FIRST_BEFORE, FIRST_AFTER, FIRST_SKETCH };
enum Second { SECOND_NONE, SECOND_FULL, SECOND_COVER, SECOND_COVER_I, SECOND_FACTORED, SECOND_SKETCH };

// The gradient that the statistics see: of the loss (or of minus it), with coupled weight decay.
FN float oriented(float grad, float param, const Rule &r) {
    float g = r.sign * grad, pulled = g + r.weight_decay * param;
    return r.weight_decay != 0.0f ? pulled : g;
}

FN float average_first(float old, float x, const Rule &r) {
    return r.first_beta * old + r.first_gain * x;
}

// What an entry's own gradient weighs in its first moment in the long run: 1 in an average,
// 1 / (1 - momentum) in a momentum.
FN float own_weight(const Rule &r) {
    return r.first_decay != 0.0f ? r.first_gain / r.first_decay : r.first_gain;
}

// What the update takes for a first moment in a count-sketch, x being the estimates of the entry's DEPTH
// buckets before this step: the moment that follows from their mean, as far as they agree, and for the rest
// the entry's own gradient. Estimates that are equal are taken as they are. NaN if one of them is not finite.
template <int DEPTH> FN float sketched_first(const float *x, float g, float weight, const Rule &r) {
    const float PER_MEAN = 1.0f / DEPTH, PER_ERROR = DEPTH > 1 ? 1.0f / (DEPTH * (DEPTH - 1)) : 0.0f;
    float mean = 0.0f, squares = 0.0f;
    for (int j = 1; j < DEPTH; j++) mean += x[j] - x[0];
    mean = x[0] + mean * PER_MEAN;
    for (int j = 0; j < DEPTH; j++) {
        float off = x[j] - mean;
        squares += off * off;
    }
    float doubt = squares * PER_ERROR * r.first_doubt, square = mean * mean, known = 1.0f - doubt / square;
    known = known > 0.0f ? known : 0.0f;
    known = square > 0.0f ? known : doubt > 0.0f ? 0.0f : 1.0f;
    float moment = average_first(mean, g, r) * r.first_scale;
    return known * moment + (1.0f - known) * (g * weight);
}

// What a gradient adds to its second moment. In torch's order: g * g overflows long before this does.
FN float gained_square(float g, const Rule &r) { return (r.second_gain * g) * g; }

FN float average_second(float old, float g, const Rule &r) {
    return r.second_beta * old + gained_square(g, r);
}

// A factored moment's column as a multiple of the columns' mean; 0 before the first gradient. A mean that
// is not finite says nothing of any entry: NaN, where the quotient by infinity would be 0.
FN float relative(float col, float mean) {
    return mean <= 0.0f ? 0.0f : col / mean + (mean - mean);
}

// 0 / 0 is 0: an entry that has never had a gradient does not move, whatever eps is. The bound is for
// finite numerators: others stay what they are.
FN float preconditioned(float numerator, float nu, const Rule &r) {
    // sqrt(scale nu + eps_inside), of which the scaled moment could overflow
    float root = sqrtf(nu + r.eps_inside / r.second_scale) * sqrtf(r.second_scale) + r.eps_outside;
    float quotient = numerator / root, most = r.largest_quotient;
    float bounded = greater(-most, lesser(most, quotient));  // NaN stays
    bounded = root == 0.0f ? 0.0f : bounded;
    return numerator - numerator == 0.0f ? bounded : quotient;
}

FN float moved(float param, float update, const Rule &r) { return param * r.decay - r.lr * update; }

// How much of its rows' estimates a bucket gives up at once. `count` rows share it in this step: beyond
// 1 / count a count-min bucket would give up more than it holds, beyond 2 / count a count-sketch's would
// overshoot 0 by more than it held, and grow without end.
FN float bounded_decay(float decay, i64 count, int is_signed) {
    float most = is_signed ? 2.0f : 1.0f;
    return decay * (float)count <= most ? decay : most / (float)count;
}

// ---- stochastic rounding of stored buffers -----------------------------------------------------------

// To one of the two neighbours, towards 0 where the other is infinite: the lower 16 bits are the odds.
FN bf16 stochastic_bf16(float x, u32 random) {
    u32 bits = as_bits(x), down = bits >> 16, away = (bits + (random & 0xffffu)) >> 16;
    u32 chosen = (away & 0x7f80u) == 0x7f80u ? down : away;
    bf16 result = {(u16)((bits & 0x7fffffffu) > 0x7f800000u ? down | 0x40u : chosen)};
    return result;
}

// x / scale to one of the two neighbouring integers. NaN becomes -127: its conversion is not defined. (The
// exchange has seen it by then in the largest |gradient|, and undoes the step.)
// What is an integer times scale, to the rounding of a float, becomes that integer whatever is drawn.
FN signed char stochastic_code(float x, float scale, u32 random) {
    float drawn = (float)(int)(random >> 17) * 3.0517578125e-5f + 1.52587890625e-5f;  // (k + 1/2) / 2^15
    float code = floorf(x / scale + drawn);
    return (signed char)(int)lesser(greater(code, -127.0f), 127.0f);
}
