// A gradient's rows on the host, and the memory that threads work in.
#pragma once

#include <cmath>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "step/entry.h"

namespace {

const i64 PARALLEL_FROM = 1 << 15;  // elements; below, starting threads costs more than it saves

// A float array that begins at a cache line: a vector load that straddles two lines costs two loads. A
// large one begins at a huge page and asks for more of them, as buckets are read from all over it.
struct Aligned {
    static constexpr size_t LINE = 64, HUGE_PAGE = 1 << 21;
    size_t alignment;
    float *data;

    explicit Aligned(i64 size) {
        const size_t bytes = size * sizeof(float);
        alignment = bytes < HUGE_PAGE ? LINE : HUGE_PAGE;
        data = (float *)::operator new(bytes, std::align_val_t(alignment));
#if defined(__linux__)
        if (alignment == HUGE_PAGE) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    }
    Aligned(Aligned &&other) : alignment(other.alignment), data(other.data) { other.data = nullptr; }
    Aligned(const Aligned &) = delete;
    ~Aligned() { ::operator delete(data, std::align_val_t(alignment)); }
    operator float *() const { return data; }
};

template <class T> struct Rows {
    const HostStep &a;
    i64 row(i64 i) const { return a.at ? a.at[i] : i; }
    T *param(i64 i) const { return (T *)a.param + row(i) * a.m; }
    const T *grad(i64 i) const { return (const T *)a.grad + i * a.m; }

    // x[c] = the oriented gradient of item i, from column `begin` on.
    void read(i64 i, i64 begin, i64 length, float *__restrict x) const {
        const T *__restrict p = param(i) + begin, *__restrict g = grad(i) + begin;
        const Rule rule = a.rule;
        if (rule.weight_decay == 0.0f)
            for (i64 c = 0; c < length; c++) x[c] = rule.sign * widen(g[c]);
        else
            for (i64 c = 0; c < length; c++) x[c] = oriented(widen(g[c]), widen(p[c]), rule);
    }

    // The same, where memory has it already; else in x.
    const float *oriented_in(i64 i, i64 begin, i64 length, float *x) const {
        if (sizeof(T) == 4 && a.rule.sign == 1.0f && a.rule.weight_decay == 0.0f)
            return (const float *)grad(i) + begin;
        read(i, begin, length, x);
        return x;
    }

    // x[c] = what its square adds to the second moment.
    void read_squares(i64 i, float *__restrict x) const {
        read(i, 0, a.m, x);
        const Rule rule = a.rule;
        for (i64 c = 0; c < a.m; c++) x[c] = gained_square(x[c], rule);
    }
};

}  // namespace
