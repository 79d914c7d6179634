// What an element's gradients are divided by, of a second moment that is not a sketch: for the host and the
// device.
#pragma once

#include "step/entry.h"

// mean: of the columns, if they are factored.
FN float root_at(const Rooting &r, i64 i, float mean) {
    float nu;
    if (r.kind == SECOND_FULL) {
        nu = r.values[i];
    } else {
        const i64 row = i / r.dim;
        const float of_row = r.row[row], of_col = r.col[i - row * r.dim];
        nu = r.kind == SECOND_FACTORED ? of_row * relative(of_col, mean) : smaller(of_row, of_col);
    }
    return sqrtf(nu + r.inside) * r.scale + r.outside;
}
