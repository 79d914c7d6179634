// The merge of packing.py for CPU tensors, compiled together with host.cpp.
//
// Lists are as long as thousands of entries and as many as hundreds, and ascend. Merging them by
// comparisons costs a branch that is guessed wrong for each entry and level; here each window of the
// positions is gone through list by list, so that sums have the order of the lists by themselves.
#include <cmath>
#include <new>
#include <vector>

#include "runtime/arithmetic.h"
#include "packing/layout.h"

namespace {

struct List {  // mirrored by host_packing.py
    const i64 *positions;
    const float *values;
    i64 length;
};

const i64 NOTHING = 0x7fffffffffffffff;

// The lists' entries by windows of the positions, each begun at the first position that is left. What
// is kept for a window stays in the cache, and is sized so that it has thousands of entries.
class Windows {
  public:
    const int width_bits;
    i64 begin = NOTHING;

    Windows(const List *lists, i64 num_lists)
        : width_bits(bits_for(lists, num_lists)), lists(lists), cursors(num_lists), num_lists(num_lists) {
        for (i64 p = 0; p < num_lists; p++)
            if (lists[p].length) begin = least(begin, lists[p].positions[0]);
    }

    // Visit the entries of this window: list by list, so that an order of sums is kept. Then go on.
    template <class Visit> void visit(Visit visit) {
        const u64 width = 1ull << width_bits;
        i64 next = NOTHING;
        for (i64 p = 0; p < num_lists; p++) {
            const List &list = lists[p];
            i64 i = cursors[p];
            for (; i < list.length && (u64)(list.positions[i] - begin) < width; i++)
                visit(list.positions[i] - begin, list, i);
            if (i < list.length) next = least(next, list.positions[i]);
            cursors[p] = i;
        }
        begin = next;
    }

    bool is_left() const { return begin != NOTHING; }

  private:
    const List *lists;
    std::vector<i64> cursors;
    const i64 num_lists;

    static i64 least(i64 a, i64 b) { return a < b ? a : b; }

    static int bits_for(const List *lists, i64 num_lists) {
        i64 total = 0, span = 0;
        for (i64 p = 0; p < num_lists; p++) {
            if (lists[p].length == 0) continue;
            total += lists[p].length;
            const i64 last = lists[p].positions[lists[p].length - 1];
            span = last > span ? last : span;
        }
        int bits = 12;
        while (bits < 16 && (double)total * (1ll << bits) < 4096.0 * (double)span) bits++;
        return bits;
    }
};

// The positions of all lists, once each, ascending; returns how many.
i64 unite(const List *lists, i64 num_lists, i64 *out) {
    Windows windows(lists, num_lists);
    std::vector<u64> marks(1ull << (windows.width_bits - 6)), marked(1ull << (windows.width_bits - 12));
    i64 count = 0;
    while (windows.is_left()) {
        const i64 begin = windows.begin;
        windows.visit([&](i64 at, const List &, i64) {
            marks[at >> 6] |= 1ull << (at & 63);
            marked[at >> 12] |= 1ull << (at >> 6 & 63);
        });
        for (size_t w = 0; w < marked.size(); w++) {
            for (u64 some = marked[w]; some; some &= some - 1) {
                const i64 word = 64 * (i64)w + __builtin_ctzll(some);
                for (u64 bits = marks[word]; bits; bits &= bits - 1)
                    out[count++] = begin + 64 * word + __builtin_ctzll(bits);
                marks[word] = 0;
            }
            marked[w] = 0;
        }
    }
    return count;
}

// sums (num_positions, dim), 0 before: each list's values in turn.
void add_up(const List *lists, i64 num_lists, const i64 *positions, i64 num_positions, i64 dim, float *sums) {
    Windows windows(lists, num_lists);
    std::vector<int> slots(1ull << windows.width_bits);  // of this window's positions; others are never read
    i64 first = 0;
    while (windows.is_left()) {
        const i64 begin = windows.begin;
        i64 last = first;
        for (; last < num_positions && positions[last] - begin < (i64)slots.size(); last++)
            slots[positions[last] - begin] = (int)(last - first);
        float *here = sums + first * dim;
        windows.visit([&](i64 at, const List &list, i64 i) {
            float *sum = here + slots[at] * dim;
            const float *values = list.values + i * dim;
            for (i64 c = 0; c < dim; c++) sum[c] += values[c];
        });
        first = last;
    }
}

}  // namespace

// ---- what ctypes calls --------------------------------------------------------------------------------

extern "C" {

i64 parsimony_list_size() { return sizeof(List); }

// Returns how many positions there are; -1 if a list is not as lists must be, since windows rely on it;
// -2 if there is too little memory.
i64 parsimony_unite(const List *lists, i64 num_lists, i64 *out) {
    for (i64 p = 0; p < num_lists; p++)
        if (order_problems(lists[p].positions, lists[p].length, NOTHING)) return -1;
    try {
        return unite(lists, num_lists, out);
    } catch (const std::bad_alloc &) {
        return -2;
    }
}

// sums are 0 before. Returns 0, or -2.
i64 parsimony_add_up(const List *lists, i64 num_lists, const i64 *positions, i64 num_positions, i64 dim,
                     float *sums) {
    try {
        add_up(lists, num_lists, positions, num_positions, dim, sums);
        return 0;
    } catch (const std::bad_alloc &) {
        return -2;
    }
}
}
