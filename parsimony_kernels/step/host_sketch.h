// Sketches on the host: the buckets of a step's items, and a block of their columns.
//
// Every item is walked once: it reads its buckets as they were before the step and adds what it inserts to
// sums beside them. The last item that has a bucket brings that up to date.
#pragma once

#include <omp.h>

#include <array>
#include <cstring>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "runtime/float_mode.h"
#include "step/host_cells.h"
#include "step/host_rows.h"

namespace {

// The buckets that k items hash to. Those that occur are numbered by `slot`, in the order in which they
// occur first. Item i has the buckets slot[i * depth + j].
struct Buckets {
    enum { FIRST = 1, LAST = 2 };  // of the items that have a bucket

    Sketch table;
    Forgetting forgetting;
    std::vector<i64> address;  // of a slot: where its first column is in the table
    std::vector<int> slot;
    std::vector<char> turn;   // whether this item is the FIRST or the LAST that has the bucket
    std::vector<float> sign;  // where there are signs
    std::vector<float> rate;  // EVENLY: the first few are every item's

    // Items are the rows `at` (null: 0..k-1); or, where are_elements, single elements `at`.
    Buckets(const Sketch &t, const i64 *at, i64 k, bool are_elements, float forget)
        : table(t), slot(k * t.depth), turn(k * t.depth, 0), sign(t.is_signed ? k * t.depth : 0) {
        const i64 buckets = t.depth * t.width;
        if (are_elements || buckets > 8 * k * t.depth) number<true>(at, k, are_elements);
        else number<false>(at, k, false);
        bound_rates(forget);
    }

    i64 num_slots() const { return (i64)address.size(); }

    // IS_SPARSE: the items have few of all cells, and `found` is an open hash table; else an array of all.
    template <bool IS_SPARSE> void number(const i64 *at, i64 k, bool are_elements) {
        const Sketch &t = table;
        size_t size = 16;
        while (IS_SPARSE && size < 2 * slot.size()) size *= 2;
        std::vector<int> found(IS_SPARSE ? size : t.depth * t.width, -1), last;
        for (i64 i = 0, entry = 0; i < k; i++)
            for (i64 j = 0; j < t.depth; j++, entry++) {
                const i64 position = at ? at[i] : i, row = are_elements ? position / t.dim : position;
                const u32 hash = hash_row(row, t.seeds[j]);
                const i64 bucket = j * t.width + bucket_of(hash, t.width);
                const i64 cell = bucket * t.dim + (are_elements ? position % t.dim : 0);
                size_t h = bucket;
                if (IS_SPARSE) {
                    h = mix((u32)cell ^ mix((u32)(cell >> 32))) & (size - 1);
                    while (found[h] >= 0 && address[found[h]] != cell) h = (h + 1) & (size - 1);
                }
                if (found[h] < 0) {
                    found[h] = (int)address.size(), address.push_back(cell), last.push_back(0);
                    turn[entry] = FIRST;
                }
                slot[entry] = found[h], last[found[h]] = (int)entry;
                if (t.is_signed) sign[entry] = sign_of(hash);
            }
        for (int entry : last) turn[entry] |= LAST;
    }

    // How much each item makes its buckets forget: less where many items share a bucket.
    void bound_rates(float forget) {
        std::vector<int> count(num_slots(), 0);
        for (int s : slot) count[s]++;
        bool is_even = true;
        for (int c : count) is_even &= bounded_forgetting(forget, c, table.is_signed) == forget;
        forgetting = forget == 0.0f ? NEVER : is_even ? EVENLY : UNEVENLY;
        rate.assign(is_even ? table.depth : slot.size(), forget);
        for (size_t i = 0; !is_even && i < slot.size(); i++)
            rate[i] = bounded_forgetting(forget, count[slot[i]], table.is_signed);
    }
};

// ---- blocks of columns -----------------------------------------------------------------------------------

// Bytes of a core's second cache. Where the system does not say, there is none to speak of.
inline i64 second_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return size > 0 ? size : 0;
#else
    return 0;
#endif
}

const i64 LONG = 2048;  // columns that are read as fast as longer rows
const i64 SHORT = 96;   // parts of rows that are shorter are read too slowly

// How many of m columns to take at once, and whether to copy their part of the buckets together. If a block
// that is not too narrow can stay in the second cache with its sums, it is copied, as columns a power of
// two apart would displace each other there. Else rows are walked as they lie in memory, and their buckets
// come from the third cache.
struct Cut {
    i64 size;
    bool is_copied;

    Cut(i64 m, i64 num_slots, int threads) {
        const i64 each = (m + 16 * threads - 1) / (16 * threads) * 16, most = each < m ? each : m;
        const i64 bytes = 2 * sizeof(float) * (num_slots > 0 ? num_slots : 1);
        const i64 fitting = second_cache() * 6 / 10 / bytes / 16 * 16;
        is_copied = fitting >= SHORT && fitting < m;
        const i64 wanted = is_copied ? fitting : LONG;
        size = wanted < most ? wanted : most;
    }
};

// A block of columns of the buckets, and what the items have inserted there so far.
struct Block {
    const Buckets &b;
    const bool is_copied;
    i64 begin = 0, length = 0;
    float keep = 1.0f;  // what the cells are scaled by as the sums are added
    Aligned cells, sums, zeros;

    Block(const Buckets &buckets, const Cut &cut)
        : b(buckets), is_copied(cut.is_copied), cells(is_copied ? b.num_slots() * cut.size : 0),
          sums(b.num_slots() * cut.size), zeros(cut.size) {
        memset(zeros, 0, cut.size * sizeof(float));
    }

    void load(i64 begin_, i64 length_) {
        begin = begin_, length = length_;
        for (i64 s = 0; is_copied && s < b.num_slots(); s++)
            memcpy(&cells[s * length], b.table.values + b.address[s] + begin, length * sizeof(float));
    }

    const float *cell(i64 slot) const {
        return is_copied ? &cells[slot * length] : b.table.values + b.address[slot] + begin;
    }

    // Where item i's buckets are, from the block's column `offset` on.
    Places find(i64 i, i64 offset) const {
        Places at;
        const i64 depth = b.table.depth, first = i * depth;
        for (i64 j = 0; j < depth; j++) {
            const i64 slot = b.slot[first + j];
            at.cells[j] = cell(slot) + offset;
            at.to[j] = &sums[slot * length + offset];
            at.from[j] = b.turn[first + j] & Buckets::FIRST ? &zeros[offset] : at.to[j];
        }
        at.sign = b.table.is_signed ? &b.sign[first] : nullptr;
        at.rate = &b.rate[b.forgetting == UNEVENLY ? first : 0];
        return at;
    }

    // Give the table what all items have inserted, of the buckets that no later item has.
    void finish(i64 i, const Places &at, i64 offset, i64 count) {
        for (i64 j = 0; j < b.table.depth; j++) {
            const i64 entry = i * b.table.depth + j;
            if (!(b.turn[entry] & Buckets::LAST)) continue;
            float *kept = b.table.values + b.address[b.slot[entry]] + begin + offset;
            const float *cell = at.cells[j], *sum = at.to[j];
            if (b.table.is_signed)
#pragma GCC ivdep
                for (i64 c = 0; c < count; c++) kept[c] = keep * cell[c] + sum[c];
            else
#pragma GCC ivdep
                for (i64 c = 0; c < count; c++) kept[c] = not_negative(cell[c] + sum[c]);
        }
    }

    // Insert gain x, or gain x - rate estimate.
    void feed_item(i64 i, const float *x, i64 offset, i64 count, float gain) {
        const i64 depth = b.table.depth;
        const Places at = find(i, offset);
        const Feed feed = b.forgetting == NEVER ? inserts[depth - 1]
                                                : feeds[depth - 1][b.table.is_signed];
        feed(at, x, count, gain);
        finish(i, at, offset, count);
    }

    // Feed x, gradients; m becomes what the update takes for their first moment. `spare` is scratch.
    void take_first(i64 i, const float *x, i64 offset, i64 count, const Rule &rule, float *m, float *spare) {
        takes[b.table.depth - 1](find(i, offset), x, count, rule, m, spare);
        feed_item(i, x, offset, count, rule.first_gain);
    }

    // Feed the squares of x, gradients; nu becomes what the update takes for their second moment.
    void take_second(i64 i, const float *x, i64 offset, i64 count, const Rule &rule, float *nu) {
        const Places at = find(i, offset);
        follows[b.table.depth - 1][b.forgetting](at, x, count, rule, nu);
        finish(i, at, offset, count);
    }
};

// Divide the blocks of m columns among the threads, each of which calls work(begin, length, block of the
// first sketch, of the second) for its own; a block is null where its sketch is.
template <class Work>
void by_blocks(std::array<const Buckets *, 2> sketches, i64 m, int threads, const Work &work) {
    i64 num_slots = 0;
    for (const Buckets *b : sketches) num_slots += b ? b->num_slots() : 0;
    const Cut cut(m, num_slots, threads);
    const i64 blocks = (m + cut.size - 1) / cut.size;
    std::vector<std::array<std::optional<Block>, 2>> all(threads);
    for (auto &own : all)
        for (int s = 0; s < 2; s++)
            if (sketches[s]) own[s].emplace(*sketches[s], cut);
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 block = 0; block < blocks; block++) {
        const InMode mode(callers);
        auto &own = all[omp_get_thread_num()];
        const i64 begin = block * cut.size, length = begin + cut.size < m ? cut.size : m - begin;
        Block *at[2];
        for (int s = 0; s < 2; s++) {
            at[s] = own[s] ? &*own[s] : nullptr;
            if (at[s]) at[s]->load(begin, length);
        }
        work(begin, length, at[0], at[1]);
    }
}

}  // namespace
