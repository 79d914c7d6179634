// One entry's step, for the host and the device; reference.py says the same in plain torch.
#pragma once

#include "runtime/arithmetic.h"

// The gradient that the statistics see: of the loss (or of minus it), with coupled weight decay.
FN float oriented(float grad, float param, const Rule &r) {
    float g = r.sign * grad, pulled = g + r.weight_decay * param;
    return r.weight_decay != 0.0f ? pulled : g;
}

FN float average_first(float old, float x, const Rule &r) {
    return r.first_beta * old + r.first_gain * x;
}

// What a gradient adds to its second moment. In torch's order: g * g overflows long before this does.
FN float gained_square(float g, const Rule &r) { return (r.second_gain * g) * g; }

FN float average_second(float old, float g, const Rule &r) {
    return r.second_beta * old + gained_square(g, r);
}

// A factored moment's column as a multiple of the columns' mean; 0 before the first gradient. Where the
// mean is not finite, so that no entry's moment is known, it is NaN (col / infinity would be 0).
FN float relative(float col, float mean) {
    return mean <= 0.0f ? 0.0f : col / mean + (mean - mean);
}

// The quotient that updates a parameter. 0 / 0 is 0, so that an entry that has never had a gradient does
// not move, whatever eps is. Only finite numerators are bounded: others stay infinite or NaN.
FN float preconditioned(float numerator, float nu, const Rule &r) {
    // sqrt(scale nu + eps_inside); written so that scale * nu cannot overflow
    float root = sqrtf(nu + r.eps_inside / r.second_scale) * sqrtf(r.second_scale) + r.eps_outside;
    float quotient = numerator / root, most = r.largest_quotient;
    float bounded = greater(-most, lesser(most, quotient));  // NaN stays
    bounded = root == 0.0f ? 0.0f : bounded;
    return numerator - numerator == 0.0f ? bounded : quotient;
}

FN float moved(float param, float update, const Rule &r) { return param * r.param_scale - r.lr * update; }

// What a step of one entry needs besides parameter and gradient.
struct EntryState {
    float *first_values, *second_values;  // the moments that are kept in full; else null
    i64 at;                               // where the entry's are in these
    float sketched_first;                 // FIRST_SKETCH: what is taken from the sketch
    float estimate;  // of the second moment, by state that is shared: covers' smaller accumulator
                     // (COVER: before this step), the product of factored means, a sketch's estimate
                     // before this step
};

// Return the parameter after a step with the gradient g (see `oriented`). Moments that are kept in full
// are brought up to date; `nu` becomes the second moment. `first` and `second`: FirstKind, SecondKind.
FN float step_entry(int first, int second, float param, float g, const EntryState &e, const Rule &r,
                    float &nu) {
    float x = g;
    if (first == FIRST_OF_GRADIENTS) {
        x = e.first_values[e.at] = average_first(e.first_values[e.at], g, r);
        x = x * r.first_scale;
    }
    if (first == FIRST_SKETCH) x = e.sketched_first;
    if (second != SECOND_NONE) {
        nu = e.estimate;
        if (second == SECOND_FULL)
            nu = e.second_values[e.at] = average_second(e.second_values[e.at], g, r);
        if (second == SECOND_COVER || second == SECOND_SKETCH) nu = average_second(e.estimate, g, r);
        x = preconditioned(x, nu, r);
    }
    if (first == FIRST_OF_UPDATES) x = e.first_values[e.at] = average_first(e.first_values[e.at], x, r);
    return moved(param, x, r);
}
