// Sketches on the host: the buckets of a step's items, and a block of their columns.
//
// Every item is walked once. It reads its buckets in the table as they were before the step, and adds what it
// inserts to sums beside them; the last item that has a bucket brings that up to date.
#pragma once

#include <omp.h>

#include <array>
#include <cstring>
#include <optional>
#include <vector>

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

const i64 LONGEST = 2048;  // columns of a block: memory is read as fast as in whole rows
const i64 HEAD = 256;      // columns of the next item's buckets that are asked for

// How many of m columns to take at once: whole rows, if they are not too long and each thread has a block.
// Parts of rows that stay in the second cache with their buckets are slower, see benchmarks/results.
inline i64 block_size(i64 m, int threads) {
    const i64 each = (m + 16 * threads - 1) / (16 * threads) * 16, most = each < m ? each : m;
    return LONGEST < most ? LONGEST : most;
}

// A block of columns of the buckets, and what the items have inserted there so far.
struct Block {
    const Buckets &b;
    i64 begin = 0, length = 0;
    float keep = 1.0f;  // what the cells are scaled by as the sums are added
    Aligned sums, zeros;

    Block(const Buckets &buckets, i64 size) : b(buckets), sums(b.num_slots() * size), zeros(size) {
        memset(zeros, 0, size * sizeof(float));
    }

    // Where item i's buckets are.
    Places find(i64 i) const {
        Places at;
        const i64 depth = b.table.depth, first = i * depth;
        for (i64 j = 0; j < depth; j++) {
            const i64 slot = b.slot[first + j];
            at.cells[j] = b.table.values + b.address[slot] + begin;
            at.to[j] = &sums[slot * length];
            at.from[j] = b.turn[first + j] & Buckets::FIRST ? zeros : at.to[j];
        }
        at.sign = b.table.is_signed ? &b.sign[first] : nullptr;
        at.rate = &b.rate[b.forgetting == UNEVENLY ? first : 0];
        return at;
    }

    // Ask for the beginning of item i's buckets; the processor foresees the rest.
    void fetch(i64 i) const {
        const i64 depth = b.table.depth, head = length < HEAD ? length : HEAD;
        for (i64 j = 0; j < depth; j++) {
            const i64 slot = b.slot[i * depth + j];
            const float *cell = b.table.values + b.address[slot] + begin, *sum = &sums[slot * length];
            for (i64 c = 0; c < head; c += 16)
                __builtin_prefetch(cell + c, 0, 2), __builtin_prefetch(sum + c, 0, 2);
        }
    }

    // Give the table what all items have inserted, of the buckets that no later item has.
    void finish(i64 i, const Places &at) {
        for (i64 j = 0; j < b.table.depth; j++) {
            if (!(b.turn[i * b.table.depth + j] & Buckets::LAST)) continue;
            float *__restrict cell = b.table.values + b.address[b.slot[i * b.table.depth + j]] + begin;
            const float *__restrict sum = at.to[j];
            if (b.table.is_signed)
                for (i64 c = 0; c < length; c++) cell[c] = keep * cell[c] + sum[c];
            else
                for (i64 c = 0; c < length; c++) cell[c] = not_negative(cell[c] + sum[c]);
        }
    }

    // Insert gain x, or gain x - rate estimate.
    void feed_item(i64 i, const float *x, float gain) {
        const i64 depth = b.table.depth;
        const Places at = find(i);
        const Feed feed = b.forgetting == NEVER ? inserts[depth - 1]
                                                : feeds[depth - 1][b.table.is_signed];
        feed(at, x, length, gain);
        finish(i, at);
    }

    // Feed x, gradients; m becomes what the update takes for their first moment. `spare` is scratch.
    void take_first(i64 i, const float *x, const Rule &rule, float *m, float *spare) {
        takes[b.table.depth - 1](find(i), x, length, rule, m, spare);
        feed_item(i, x, rule.first_gain);
    }

    // Feed the squares of x, gradients; nu becomes what the update takes for their second moment.
    void take_second(i64 i, const float *x, const Rule &rule, float *nu) {
        const Places at = find(i);
        follows[b.table.depth - 1][b.forgetting](at, x, length, rule, nu);
        finish(i, at);
    }
};

// Divide the blocks of m columns among the threads, each of which calls work(begin, length, block of the
// first sketch, of the second) for its own; a block is null where its sketch is.
template <class Work>
void by_blocks(std::array<const Buckets *, 2> sketches, i64 m, int threads, const Work &work) {
    const i64 size = block_size(m, threads), blocks = (m + size - 1) / size;
    std::vector<std::array<std::optional<Block>, 2>> all(threads);
    for (auto &own : all)
        for (int s = 0; s < 2; s++)
            if (sketches[s]) own[s].emplace(*sketches[s], size);
    const ModeBits callers = current_mode();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 block = 0; block < blocks; block++) {
        const InMode mode(callers);
        const i64 begin = block * size, length = begin + size < m ? size : m - begin;
        Block *at[2] = {};
        for (int s = 0; s < 2; s++) {
            if (!sketches[s]) continue;
            at[s] = &*all[omp_get_thread_num()][s];
            at[s]->begin = begin, at[s]->length = length;
        }
        work(begin, length, at[0], at[1]);
    }
}

}  // namespace
