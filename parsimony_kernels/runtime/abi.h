// What Python hands to C++ and CUDA: structures, and the numbers that stand for kinds of things.
//
// Every structure has a ctypes.Structure of the same name and fields in Python, and every enum a Python
// enum or tuple. tests/unit/parsimony_kernels/runtime/test_abi.py has the compilers of both check all
// offsets and numbers. Nothing is included here: NVRTC has no standard headers.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// How a tensor's elements are stored: parameters, gradients and buffers. runtime/operands.py.
enum Storage { STORAGE_ABSENT, STORAGE_FLOAT32, STORAGE_BFLOAT16, STORAGE_FLOAT16, STORAGE_BLOCKS };

// Tensors for which one launch works. Each is a number of blocks of work, which are numbered through all.
struct Batch {
    const void *steps;  // (count,) of the structures that say what is to be done
    const i64 *ends;    // (count,) where each one's blocks end
    i64 count;
};

// ---- step ------------------------------------------------------------------------------------------

constexpr int MAX_DEPTH = 5;  // of a sketch

// Where a first moment comes from: the gradients (kept in full, or in a sketch), or the preconditioned
// updates.
enum FirstKind { FIRST_NONE, FIRST_OF_GRADIENTS, FIRST_OF_UPDATES, FIRST_SKETCH };

// How a second moment is kept. COVER is SM3-II, COVER_I is SM3-I.
enum SecondKind { SECOND_NONE, SECOND_FULL, SECOND_COVER, SECOND_COVER_I, SECOND_FACTORED, SECOND_SKETCH };

// The scalars of an update; operands.Rule says what each does.
struct Rule {
    float lr, param_scale, weight_decay, sign;
    float first_beta, first_gain, first_forgetting, first_scale, first_doubt;
    float second_beta, second_gain, second_forgetting, second_scale;
    float eps_inside, eps_outside, largest_quotient;
};

struct Sketch {
    float *values;  // (depth, width, dim)
    i64 width, dim, seeds[MAX_DEPTH];
    int depth, is_signed;
};

// A step on the host. n rows of m columns make the parameter, k of its rows or elements arrive.
struct HostStep {
    void *param;        // (n, m)
    const void *grad;   // (k, m); of elements: (k,) float32
    const i64 *at;      // (k,) rows, or flat elements; null: every row
    i64 n, m, k;
    int storage, first, second, threads;  // storage is that of the parameter
    int is_elements;
    float *first_values;   // FIRST_OF_GRADIENTS, FIRST_OF_UPDATES
    float *second_values;  // SECOND_FULL
    float *row, *col;      // covers, factored means
    Sketch first_sketch, second_sketch;
    Rule rule;
    float *num_steps;      // of a step that is kept: one number, which it adds 1 to
};

// How a kernel divides num_rows x num_columns into tiles: see step/device_tiles.h.
struct Tiling {
    i64 num_rows, num_columns, num_tiles;
    int lanes, rows_per_thread, is_packed;
};

// Rows or elements of a gradient on the device. num_rows and dim are the parameter's.
struct Items {
    i64 num_items, num_rows, dim;
    const i64 *positions;  // of rows, or of elements in the flattened parameter; null: all rows
    void *param;           // in its own type; null where a gradient is only observed
    const void *grad;      // rows in the parameter's type; float for elements and for sketch_update
    const float *scale;    // one number, multiplies an observed gradient; null: 1
    int is_elements, is_dense;
    int is_aligned;        // whether param, grad and state lie on boundaries of four elements
};

// What one tensor's elements are divided by: sqrt(second moment + inside) * scale + outside.
struct Rooting {
    int kind;                // SECOND_FULL, SECOND_COVER or SECOND_FACTORED
    const float *values;     // full
    const float *row, *col;  // the others
    float *mean;             // factored, on the device: of col, for `root_means` to write
    i64 dim;                 // columns
    i64 end;    // the positions before this one, and not before the last tensor's end, are of this tensor,
    i64 first;  //   whose elements are `first` less
    float inside, scale, outside;
};
struct Rootings {
    const Rooting *rootings;  // (count,)
    i64 count;
    const i64 *positions;
    float *roots;  // of each position
};

// What is inserted into a sketch: values as they are, the gradient, or its square.
enum Inserted { INSERTED_VALUES, INSERTED_GRADIENT, INSERTED_SQUARE };

// Insertions into one sketch on the device. A cell is a bucket of the flattened (depth,
// width), or for elements a single number of the table. cells and order have depth * num_items entries.
struct Feeding {
    Rule rule;
    Items items;
    Tiling tiling;
    Sketch sketch;
    int inserted;
    float gain, forgetting, keep;
    i64 *cells;          // of each (depth, item), plus first_cell: no two sketches share a number
    const i64 *sorted;   // the same, ascending,
    const i64 *order;    //   and whose each is among the entries of all, of which these begin at first_entry
    const i64 *ranks;    // how many distinct cells there are up to each, of all
    i64 first_cell, first_entry;
    float *fresh;        // (distinct cells, columns): new values, while the old are still read
};

// A query of a sketch on the device.
struct Query {
    Items items;
    Tiling tiling;
    Sketch sketch;
    float *estimates;  // (num_items, dim), or of elements (num_items,)
};

// A step on the device.
struct DeviceStep {
    Rule rule;
    Items items;
    Tiling tiling;
    int first, second;
    float *first_values, *second_values;
    Sketch first_sketch, second_sketch;
    float *row, *col;             // covers, factored means
    u32 *row_max, *col_max;       // covers: maxima of this step, 0 before it
    float *averages;              // covers, elements: (2, num_items), what row and col are raised to
    double *row_sums, *col_sums;  // factored: (tiles across, num_items), (tiles down, dim)
    float *mean;                  // factored: of col
    double *changes;              // factored, elements: (num_items,)
    i64 *keys;                    // factored, elements: (num_items,) first_key + column of each,
    const i64 *sorted, *order;    //   sorted, and whose each is among all of the batch's elements,
    i64 first_key, first_item;    //   of which this step's are the ones from first_item on
    u32 *is_wrong;                // whether positions are not ascending, unique and in range
};

// ---- buffers ---------------------------------------------------------------------------------------

constexpr int BLOCK = 256;  // elements that share a scale where 8 bits are stored
constexpr int LEVELS = 127;
constexpr float MIN_SCALE = 1e-30f;
constexpr int BIN_SHIFT = 20, BINS = 1 << (31 - BIN_SHIFT);  // of the histogram of magnitudes

struct Stored {
    void *values;
    float *scales;  // of STORAGE_BLOCKS
    i64 storage;
};

struct Correction { float u_beta, u_gain, v_from_u, v_gain; };

// A pass over gradient, velocity and residual, on the host or the device.
struct Accumulation {
    Stored grad;  // absent: entries are selected from what is stored
    Stored residual, old_residual, velocity, old_velocity;
    i64 numel, residual_key, velocity_key;
    const float *scale;          // one number, multiplies the gradient; null: 1
    u32 *report;                 // max |x| as bits, count, BINS counts; 0 before
    i64 *indices;                // these three list what is taken out; null: nothing is
    float *values, *velocities;  // velocities null: they stay
    i64 capacity;                // of the list; on the host, of each thread's
    u32 sample_every, sample_first;
    float threshold;
    Correction correction;
    int threads;       // on the host
    int lagged, lags;  // whether the old residual lags, and whether the new one is to: ops.py
    i64 first;         // what is added to the indices that are listed
};

// Writing values at elements of a buffer, and of several.
struct Putting {
    Stored buffer;
    i64 end;    // the positions before this one, and not before the last buffer's end, are of this buffer,
    i64 first;  //   whose elements are `first` less
    i64 key;
};
struct Puttings {
    const Putting *puttings;  // (count,)
    i64 count;
    const i64 *positions;  // unique within a buffer
    const float *values;   // null: 0
};

// ---- packing ---------------------------------------------------------------------------------------

constexpr int GROUP = 32;  // values that share a scale
constexpr u32 MAGIC = 0x50444703u;
constexpr int TOTAL_WORD = 1, LAYOUT_WORD = 2, COUNT_WORD = 3, CHECKSUM_WORD = 4, HEADER_WORDS = 5;
constexpr i64 NO_POSITION = 0x7fffffffffffffffll;  // behind all others, where lists have room left

enum IndexCoding { INDEX_INT32, INDEX_INT64, INDEX_ELIAS_FANO };
enum ValueCoding { VALUE_FLOAT32, VALUE_FLOAT16, VALUE_MXFP8, VALUE_MXFP4 };
enum Problem {
    PROBLEM_CHECKSUM = 1,
    PROBLEM_COUNT = 2,
    PROBLEM_ORDER = 4,
    PROBLEM_OUTSIDE = 8,
    PROBLEM_PADDING = 16,
    PROBLEM_NOT_FINITE = 32
};

// Where a message's parts begin, in words.
struct Sections {
    i64 num_entries, num_values, universe;
    i64 indices, low, values, scales, end;
    int index_coding, value_coding, low_bits;
};

// A list of entries to merge, on the host.
struct EntryList {
    const i64 *positions;
    const float *values;
    i64 length;
};

// Packing or unpacking on the device.
struct Packing {
    Sections parts;
    u32 *words;
    i64 *positions;   // with values: read to pack, written to unpack
    float *values;
    float *rounded;
    int *counts;      // of set bits in each of Elias-Fano's upper words
    const i64 *ends;  // running sums of counts
    u32 *found;       // checksum, less the message's own; Problem
};

// One of the messages that are joined end to end.
struct Message {
    Sections parts;
    i64 first_word, first_entry;  // of all words, and of the entries of all messages
};

// Unpacking joined messages together on the device, and what they are told apart by.
struct Joined {
    Sections form;  // of which the universe and the codings count
    i64 num_words, num_messages, messages_per_group, room, dim, flag_words;
    const u32 *words;
    Message *messages;  // num_messages and one more, which begins where all end
    u32 *flags;         // (num_messages, flag_words)
    u32 *found;         // of each: checksum, less the message's own; Problem
    int *counts;        // of set bits in each word of Elias-Fano's upper parts; 0 for other words
    const i64 *ends;    // running sums of counts
    i64 *keys;          // (room,): position, plus the group's number times the universe
    float *values;      // (room, dim)
    u32 layout;
};

// Merging on the device.
struct Merging {
    i64 num_entries, dim;
    const i64 *sorted, *order;  // all lists' positions, and which entry each is of; equal ones in order
    const i64 *ranks;           // how many distinct positions there are up to each
    const float *values;        // (num_entries, dim) of the joined lists
    i64 *positions;
    float *sums;                // (distinct positions, dim)
};
