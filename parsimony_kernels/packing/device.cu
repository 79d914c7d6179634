// The operations of packing/ops.py on a GPU; packing/device.py launches these kernels. runtime/grid.h says
// on what terms.
//
// Mappings: "flat" is one thread an item, a word, an entry or a value; pack_values and round_values
// have one warp for a group of values, a lane for each. What is packed is gathered word by word and
// needs no atomics. The only atomics are a sum of unsigned integers (the checksum) and an or (problems):
// the order of threads changes no result.
//
// Whatever a message holds, only its own words are read, and only the `num_entries` positions and
// `num_values` values that were laid out for it are written.
#include "packing/layout.h"
#include "runtime/grid.h"

FN void report(const Packing &s, u32 problem) { atomicOr(s.found + 1, problem); }

// ---- positions ---------------------------------------------------------------------------------

FN i64 upper_bit(const Packing &s, i64 i) { return (s.positions[i] >> s.parts.low_bits) + i; }

// Word `w` of Elias-Fano's upper bits, from the first position whose bit is not before it.
FN u32 upper_word(const Packing &s, i64 w) {
    i64 first = 0, last = s.parts.num_entries;
    while (first < last) {
        i64 middle = first + (last - first) / 2;
        if (upper_bit(s, middle) < 32 * w) first = middle + 1;
        else last = middle;
    }
    u32 word = 0;
    for (; first < s.parts.num_entries; first++) {
        u64 at = (u64)(upper_bit(s, first) - 32 * w);
        if (at >= 32) break;
        word |= 1u << at;
    }
    return word;
}

// Flat over the words of the positions. No atomics.
KERNEL(pack_positions, Packing) {
    const Sections &x = s.parts;
    for (i64 i = x.indices + flat_start(); i < x.values; i += flat_stride()) {
        i64 w = i - x.indices;
        if (x.index_coding == INDEX_INT32) s.words[i] = (u32)s.positions[w];
        else if (x.index_coding == INDEX_INT64)
            s.words[i] = (u32)((u64)s.positions[w / 2] >> (w & 1 ? 32 : 0));
        else s.words[i] = i < x.low ? upper_word(s, w) : low_word(x, s.positions, i - x.low);
    }
}

// Flat over the upper words. No atomics.
KERNEL(unpack_counts, Packing) {
    for (i64 w = flat_start(); w < s.parts.low - s.parts.indices; w += flat_stride())
        s.counts[w] = __popc(s.words[s.parts.indices + w]);
}

// Flat over the upper words: the positions whose bits are there.
KERNEL(unpack_coded, Packing) {
    const Sections &x = s.parts;
    const i64 num_words = x.low - x.indices;
    for (i64 w = flat_start(); w < num_words; w += flat_stride()) {
        i64 rank = s.ends[w] - s.counts[w];
        u32 bits = s.words[x.indices + w];
        for (int bit = 0; bit < 32; bit++) {
            if (!(bits >> bit & 1)) continue;
            if (rank < x.num_entries)
                s.positions[rank] = coded_position(x, s.words, 32 * w + bit, rank);
            rank++;
        }
        if (w == num_words - 1 && rank != x.num_entries) report(s, PROBLEM_COUNT);
    }
}

// Flat over entries. No atomics.
KERNEL(unpack_plain, Packing) {
    for (i64 i = flat_start(); i < s.parts.num_entries; i += flat_stride())
        s.positions[i] = plain_position(s.parts, s.words, i);
}

// Flat over entries: they must ascend and lie within the universe.
KERNEL(check_positions, Packing) {
    for (i64 i = flat_start(); i < s.parts.num_entries; i += flat_stride()) {
        i64 position = s.positions[i];
        if (position < 0 || position >= s.parts.universe) report(s, PROBLEM_OUTSIDE);
        if (i > 0 && s.positions[i - 1] >= position) report(s, PROBLEM_ORDER);
    }
}

// ---- values ------------------------------------------------------------------------------------

// All of the warp must come here together.
template <class E> FN u32 scale_of_group(float x) {
    return scale_of<E>(max_over_lanes(magnitude_bits(x), GROUP));
}

template <class E> FN float rounded(float x) {
    u32 scale = scale_of_group<E>(x);
    return value_of<E>(code_of<E>(x, scale), scale);
}

// A warp for each group.
KERNEL(round_values, Packing) {
    for (i64 i = flat_start(); i / GROUP * GROUP < s.parts.num_values; i += flat_stride()) {
        bool is_inside = i < s.parts.num_values;
        float x = is_inside ? s.values[i] : 0.0f;
        if (s.parts.value_coding == VALUE_FLOAT16) x = widen(narrow_within_range(x));
        else x = s.parts.value_coding == VALUE_MXFP8 ? rounded<E4M3>(x) : rounded<E2M1>(x);
        if (is_inside) s.rounded[i] = x;
    }
}

// A group's codes and scale, as bytes; two codes of 4 bits make one.
template <class E> FN void pack_group(const Packing &s, i64 i, float x) {
    unsigned char *bytes = (unsigned char *)(s.words + s.parts.values);
    u32 scale = scale_of_group<E>(x), code = code_of<E>(x, scale);
    if (E::SIGN == 8) {
        u32 next = __shfl_xor_sync(WHOLE_WARP, i < s.parts.num_values ? code : 0u, 1);
        if (i % 2 == 0 && i < s.parts.num_values) bytes[i / 2] = (unsigned char)(code | next << 4);
    } else if (i < s.parts.num_values) {
        bytes[i] = (unsigned char)code;
    }
    if (i % GROUP == 0) ((unsigned char *)(s.words + s.parts.scales))[i / GROUP] = (unsigned char)scale;
}

// A warp for each group, of any type. Each byte is written by one thread; no atomics.
KERNEL(pack_values, Packing) {
    const Sections &x = s.parts;
    for (i64 i = flat_start(); i / GROUP * GROUP < x.num_values; i += flat_stride()) {
        float value = i < x.num_values ? s.values[i] : 0.0f;
        if (x.value_coding == VALUE_MXFP8) pack_group<E4M3>(s, i, value);
        else if (x.value_coding == VALUE_MXFP4) pack_group<E2M1>(s, i, value);
        else if (i >= x.num_values) continue;
        else if (x.value_coding == VALUE_FLOAT32) s.words[x.values + i] = as_bits(value);
        else ((f16 *)(s.words + x.values))[i] = narrow_within_range(value);
    }
}

FN float unpacked_value(const Sections &x, const u32 *words, i64 i) {
    if (x.value_coding == VALUE_FLOAT32) return as_float(words[x.values + i]);
    if (x.value_coding == VALUE_FLOAT16) return widen(((const f16 *)(words + x.values))[i]);
    u32 scale = ((const unsigned char *)(words + x.scales))[i / GROUP];
    const unsigned char *bytes = (const unsigned char *)(words + x.values);
    if (x.value_coding == VALUE_MXFP8) return value_of<E4M3>(bytes[i], scale);
    return value_of<E2M1>(bytes[i / 2] >> (4 * (i & 1)) & 15, scale);
}

// Flat over values; the first thread looks at all padding.
KERNEL(unpack_values, Packing) {
    for (i64 i = flat_start(); i < s.parts.num_values; i += flat_stride()) {
        float value = unpacked_value(s.parts, s.words, i);
        if (!is_finite(value)) report(s, PROBLEM_NOT_FINITE);
        if (i == 0 && !is_padding_zero(s.parts, s.words)) report(s, PROBLEM_PADDING);
        s.values[i] = value;
    }
}

// ---- the checksum ------------------------------------------------------------------------------

// All threads of a thread block must come here together; the first one gets the sum.
FN u32 sum_over_block(u32 sum) {
    __shared__ u32 sums[THREADS / 32];
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, apart);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < THREADS / 32; warp++) sum += sums[warp];
    return sum;
}

FN u32 checksum_of(u32 word, i64 i) { return i == CHECKSUM_WORD ? 0u - word : checked(word, i); }

// Flat over groups of four words, which are read in one go if the message lies on a boundary of 16 bytes:
// their sum, less the one that the message has. One atomic for each thread block.
KERNEL(message_checksum, Packing) {
    const bool is_wide = ((u64)s.words & 15) == 0;
    u32 sum = 0;
    for (i64 i = 4 * flat_start(); i < s.parts.end; i += 4 * flat_stride()) {
        if (is_wide && i + 4 <= s.parts.end) {
            const uint4 four = *(const uint4 *)(s.words + i);
            sum += checksum_of(four.x, i) + checksum_of(four.y, i + 1);
            sum += checksum_of(four.z, i + 2) + checksum_of(four.w, i + 3);
        } else {
            for (i64 k = i; k < i + 4 && k < s.parts.end; k++) sum += checksum_of(s.words[k], k);
        }
    }
    sum = sum_over_block(sum);
    if (threadIdx.x == 0) atomicAdd(s.found, sum);
}

// ---- joined messages -----------------------------------------------------------------------------

// The last message that begins at `at` or before, by words or by entries.
FN i64 message_at(const Joined &s, i64 at, bool by_words) {
    i64 first = 0, last = s.num_messages - 1;
    while (first < last) {
        i64 middle = first + (last - first + 1) / 2;
        const Message &x = s.messages[middle];
        if ((by_words ? x.first_word : x.first_entry) <= at) first = middle;
        else last = middle - 1;
    }
    return first;
}

FN void report_joined(const Joined &s, i64 message, u32 problem) {
    atomicOr(s.found + 2 * message + 1, problem);
}

// A message's entries, if its header, `left` words before the end, is one that could be meant.
FN i64 entries_of_header(const Joined &s, const u32 *words, i64 left) {
    if (left < HEADER_WORDS + s.flag_words || words[0] != MAGIC) return -1;
    i64 count = words[COUNT_WORD];
    bool is_meant = words[LAYOUT_WORD] == s.layout && count <= s.form.universe;
    return is_meant && count <= 8 * left / s.dim ? count : -1;  // a value has at least 4 bits
}

// One thread goes from header to header. Behind one that is wrong there are no messages.
KERNEL(find_messages, Joined) {
    if (flat_start() != 0) return;
    i64 word = 0, entry = 0;
    bool is_lost = false;
    for (i64 m = 0; m < s.num_messages; m++) {
        const u32 *words = s.words + word;
        i64 left = s.num_words - word, count = is_lost ? -1 : entries_of_header(s, words, left);
        Sections parts = laid_out(s.form, count > 0 ? count : 0, s.dim, s.flag_words);
        is_lost = count < 0 || words[TOTAL_WORD] != 4 * (u64)parts.end || parts.end > left ||
                  count > s.room - entry;
        if (is_lost) {
            parts.num_entries = parts.num_values = parts.end = 0;
            report_joined(s, m, PROBLEM_COUNT);
        }
        s.messages[m].parts = parts;
        s.messages[m].first_word = word;
        s.messages[m].first_entry = entry;
        for (i64 i = 0; i < s.flag_words; i++)
            s.flags[m * s.flag_words + i] = is_lost ? 0u : words[HEADER_WORDS + i];
        word += parts.end;
        entry += parts.num_entries;
    }
    s.messages[s.num_messages].first_word = word;
    s.messages[s.num_messages].first_entry = entry;
    if (word != s.num_words) report_joined(s, 0, PROBLEM_COUNT);
}

// Flat over all words: checksums, and the bits of Elias-Fano's upper parts. One atomic for each warp
// whose words are all of one message, else one for each word.
KERNEL(count_joined, Joined) {
    const i64 end = s.messages[s.num_messages].first_word;
    for (i64 i = flat_start(); i / 32 * 32 < s.num_words; i += flat_stride()) {
        u32 sum = 0;
        int count = 0;
        i64 m = message_at(s, i, true);
        if (i < end) {
            const Sections &x = s.messages[m].parts;
            i64 w = i - s.messages[m].first_word;
            sum = w == CHECKSUM_WORD ? 0u - s.words[i] : checked(s.words[i], w);
            bool is_upper = x.index_coding == INDEX_ELIAS_FANO && w >= x.indices && w < x.low;
            count = is_upper ? __popc(s.words[i]) : 0;
        }
        if (i < s.num_words) s.counts[i] = count;
        u32 highest = max_over_lanes((u32)m, 32), lowest = ~max_over_lanes(~(u32)m, 32);
        if (highest != lowest) {
            atomicAdd(s.found + 2 * m, sum);
            continue;
        }
        for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, apart);
        if (threadIdx.x % 32 == 0) atomicAdd(s.found + 2 * m, sum);
    }
}

FN void put_key(const Joined &s, i64 m, i64 rank, i64 position) {
    const Message &x = s.messages[m];
    if (rank < x.parts.num_entries)
        s.keys[x.first_entry + rank] =
            (i64)((u64)position + (u64)(m / s.messages_per_group) * (u64)s.form.universe);
}

// Flat over all words: the positions that they hold, or whose bits are there. No atomics but for
// problems.
KERNEL(unpack_joined_positions, Joined) {
    const i64 end = s.messages[s.num_messages].first_word;
    for (i64 i = flat_start(); i < end; i += flat_stride()) {
        i64 m = message_at(s, i, true);
        const Message &message = s.messages[m];
        const Sections &x = message.parts;
        const u32 *words = s.words + message.first_word;
        i64 w = i - message.first_word - x.indices;
        if (w < 0 || w >= x.low - x.indices) continue;
        if (x.index_coding == INDEX_INT32) put_key(s, m, w, plain_position(x, words, w));
        if (x.index_coding == INDEX_INT64 && w % 2 == 0)
            put_key(s, m, w / 2, plain_position(x, words, w / 2));
        if (x.index_coding != INDEX_ELIAS_FANO) continue;
        const i64 first = message.first_word + x.indices;
        i64 rank = s.ends[i] - s.counts[i] - (s.ends[first] - s.counts[first]);
        for (int bit = 0; bit < 32; bit++) {
            if (!(s.words[i] >> bit & 1)) continue;
            if (rank < x.num_entries)
                put_key(s, m, rank, coded_position(x, words, 32 * w + bit, rank));
            rank++;
        }
        if (w == x.low - x.indices - 1 && rank != x.num_entries) report_joined(s, m, PROBLEM_COUNT);
    }
}

FN void check_key(const Joined &s, i64 m, i64 entry) {
    const i64 base = m / s.messages_per_group * s.form.universe, key = s.keys[entry];
    if (key < base || key - base >= s.form.universe) report_joined(s, m, PROBLEM_OUTSIDE);
    if (entry > s.messages[m].first_entry && s.keys[entry - 1] >= key)
        report_joined(s, m, PROBLEM_ORDER);
}

// Flat over the values that there is room for. Those behind the last are left as they are.
KERNEL(unpack_joined_values, Joined) {
    const i64 end = s.messages[s.num_messages].first_entry;
    for (i64 i = flat_start(); i < end * s.dim; i += flat_stride()) {
        i64 entry = i / s.dim, m = message_at(s, entry, false);
        const Message &message = s.messages[m];
        const u32 *words = s.words + message.first_word;
        i64 number = i - message.first_entry * s.dim;
        float value = unpacked_value(message.parts, words, number);
        if (!is_finite(value)) report_joined(s, m, PROBLEM_NOT_FINITE);
        if (number == 0 && !is_padding_zero(message.parts, words))
            report_joined(s, m, PROBLEM_PADDING);
        if (i == entry * s.dim) check_key(s, m, entry);
        s.values[i] = value;
    }
}

// ---- merge -------------------------------------------------------------------------------------

// Flat over (sorted entries, dim): the thread at a position's first entry adds all values of that
// position in order, from 0. No atomics; any thread order.
KERNEL(merge_sums, Merging) {
    for (i64 k = flat_start(); k < s.num_entries * s.dim; k += flat_stride()) {
        i64 i = k / s.dim, column = k - i * s.dim, position = s.sorted[i];
        if (position == NO_POSITION || (i > 0 && s.sorted[i - 1] == position)) continue;
        float sum = 0.0f;
        for (; i < s.num_entries && s.sorted[i] == position; i++)
            sum += s.values[s.order[i] * s.dim + column];
        i64 slot = s.ranks[k / s.dim] - 1;
        s.sums[slot * s.dim + column] = sum;
        if (column == 0) s.positions[slot] = position;
    }
}
