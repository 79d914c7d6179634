// The merge of packing/ops.py for CPU tensors; loaded through ctypes.
//
// There are up to hundreds of lists of thousands of entries, each ascending. A merge that compares entries
// costs a mispredicted branch for each entry and level. Here the positions are cut into windows, and within
// a window one list is visited after the other. This also adds the values in the order of the lists.
#include <cmath>
#include <new>
#include <vector>

#include "packing/layout.h"

namespace {

const i64 NOTHING = 0x7fffffffffffffff;

// The lists' entries, in windows of the positions. A window begins at the first position that is left. It
// is small enough that what is kept for it stays in the cache, and large enough for thousands of entries.
class Windows {
  public:
    const int width_bits;
    i64 begin = NOTHING;

    Windows(const EntryList *lists, i64 num_lists)
        : width_bits(bits_for(lists, num_lists)), lists(lists), cursors(num_lists), num_lists(num_lists) {
        for (i64 p = 0; p < num_lists; p++)
            if (lists[p].length) begin = least(begin, lists[p].positions[0]);
    }

    // Visit the entries of this window: list by list, so that an order of sums is kept. Then go on.
    template <class Visit> void visit(Visit visit) {
        const u64 width = 1ull << width_bits;
        i64 next = NOTHING;
        for (i64 p = 0; p < num_lists; p++) {
            const EntryList &list = lists[p];
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
    const EntryList *lists;
    std::vector<i64> cursors;
    const i64 num_lists;

    static i64 least(i64 a, i64 b) { return a < b ? a : b; }

    static int bits_for(const EntryList *lists, i64 num_lists) {
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
i64 unite(const EntryList *lists, i64 num_lists, i64 *out) {
    Windows windows(lists, num_lists);
    std::vector<u64> marks(1ull << (windows.width_bits - 6)), marked(1ull << (windows.width_bits - 12));
    i64 count = 0;
    while (windows.is_left()) {
        const i64 begin = windows.begin;
        windows.visit([&](i64 at, const EntryList &, i64) {
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
void add_up(const EntryList *lists, i64 num_lists, const i64 *positions, i64 num_positions, i64 dim,
            float *sums) {
    Windows windows(lists, num_lists);
    std::vector<int> slots(1ull << windows.width_bits);  // of this window's positions; others are never read
    i64 first = 0;
    while (windows.is_left()) {
        const i64 begin = windows.begin;
        i64 last = first;
        for (; last < num_positions && positions[last] - begin < (i64)slots.size(); last++)
            slots[positions[last] - begin] = (int)(last - first);
        float *here = sums + first * dim;
        windows.visit([&](i64 at, const EntryList &list, i64 i) {
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

// Returns how many positions there are; -1 if a list does not ascend or has negative positions, which
// Windows relies on; -2 if there is too little memory.
i64 parsimony_unite(const EntryList *lists, i64 num_lists, i64 *out) {
    for (i64 p = 0; p < num_lists; p++)
        if (order_problems(lists[p].positions, lists[p].length, NOTHING)) return -1;
    try {
        return unite(lists, num_lists, out);
    } catch (const std::bad_alloc &) {
        return -2;
    }
}

// sums are 0 before. Returns 0, or -2.
i64 parsimony_add_up(const EntryList *lists, i64 num_lists, const i64 *positions, i64 num_positions, i64 dim,
                     float *sums) {
    try {
        add_up(lists, num_lists, positions, num_positions, dim, sums);
        return 0;
    } catch (const std::bad_alloc &) {
        return -2;
    }
}
}
