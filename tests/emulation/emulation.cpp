// Runs the CUDA kernels on a CPU. Every CUDA thread is a fiber that runs
// until it waits at a barrier or for its warp; blocks, a block's warps and a warp's lanes run in an
// order that the caller chooses, so that a missing barrier or a result that depends on the order
// shows as a difference. Threads that wait where others have left are an error, with a message.
#include "cuda.h"

#include "runtime/kernels.cu"

#include <csetjmp>
#include <cstdlib>
#include <numeric>
#include <string>
#include <ucontext.h>
#include <vector>

Extent gridDim, blockDim, blockIdx, threadIdx;
extern char __start_emulated_shared[], __stop_emulated_shared[];

namespace {

enum State { READY, AT_BARRIER, IN_WARP, DONE };

struct Fiber {
    State state;
    uint32_t mask;
    int apart;
    uint64_t sent, received;
    bool is_started = false;
    ucontext_t start;
    jmp_buf where;
    std::vector<char> stack;
};

typedef void (*Kernel)(const void *);

const size_t STACK_BYTES = 64 << 10;
std::vector<Fiber> fibers;
Fiber *current;
jmp_buf scheduler;
Kernel kernel;
const void *argument;
std::string error;

// ucontext starts a fiber; from then on _setjmp and _longjmp switch, which make no system call.
void live() {
    for (;;) {
        kernel(argument);
        current->state = DONE;
        if (!_setjmp(current->where)) _longjmp(scheduler, 1);
    }
}

__attribute__((noinline)) void pause_in(State state) {
    current->state = state;
    if (!_setjmp(current->where)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(unsigned thread) {
    current = &fibers[thread];
    threadIdx.x = thread;
    if (_setjmp(scheduler)) return;
    if (current->is_started) _longjmp(current->where, 1);
    current->is_started = true;
    setcontext(&current->start);
}

void make_fibers(unsigned count) {
    if (fibers.size() == count && error.empty()) return;
    fibers = std::vector<Fiber>(count);
    for (Fiber &fiber : fibers) {
        fiber.stack.resize(STACK_BYTES);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, live, 0);
    }
}

// 0: as numbered; 1: backwards; any other seed: shuffled, anew at each call.
struct Order {
    uint64_t seed;

    uint64_t draw() {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        return seed >> 33;
    }

    void arrange(std::vector<unsigned> &items) {
        std::iota(items.begin(), items.end(), 0u);
        if (seed == 1)
            for (size_t i = 0; i < items.size(); i++) items[i] = items.size() - 1 - i;
        else if (seed > 1)
            for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[draw() % i]);
        if (seed > 1) seed |= 2;
    }
};

// Hand over what a warp's lanes sent each other, if all of them have come; else return false.
bool release_warp(unsigned first) {
    Fiber *lanes = &fibers[first];
    bool is_released = false;
    for (unsigned i = 0; i < 32; i++) {
        if (lanes[i].state != IN_WARP) continue;
        for (unsigned k = 0; k < 32; k++) {
            if (!(lanes[i].mask >> k & 1)) continue;
            if (lanes[k].state == DONE) error = "a thread left before a warp it is named in";
            if (lanes[k].state != IN_WARP || lanes[k].mask != lanes[i].mask) return false;
            if (lanes[k].apart != lanes[i].apart) error = "lanes of a warp shuffle differently";
        }
        is_released = true;
    }
    if (!is_released) return false;
    for (unsigned i = 0; i < 32; i++)
        if (lanes[i].state == IN_WARP) lanes[i].received = lanes[i ^ lanes[i].apart].sent;
    for (unsigned i = 0; i < 32; i++)
        if (lanes[i].state == IN_WARP) lanes[i].state = READY;
    return true;
}

// Let all go on from a barrier; returns false when nobody can, which is an error unless all have
// left.
bool release_barrier() {
    unsigned count[4] = {};
    for (Fiber &fiber : fibers) count[fiber.state]++;
    if (count[AT_BARRIER] == fibers.size()) {
        for (Fiber &fiber : fibers) fiber.state = READY;
        return true;
    }
    if (error.empty() && count[DONE] < fibers.size())
        error = std::to_string(count[AT_BARRIER]) + " threads wait at a barrier and " +
                std::to_string(count[IN_WARP]) + " for their warp, while " +
                std::to_string(count[DONE]) + " of the block have left";
    return false;
}

// One warp after another, each as far as it comes: the most that warps may drift apart.
void run_block(Order &order) {
    memset(__start_emulated_shared, 0xa5, __stop_emulated_shared - __start_emulated_shared);
    std::vector<unsigned> warps(fibers.size() / 32), lanes(32);
    for (Fiber &fiber : fibers) fiber.state = READY;
    do {
        order.arrange(warps);
        for (unsigned warp : warps) do {
            order.arrange(lanes);
            for (unsigned lane : lanes)
                if (fibers[warp * 32 + lane].state == READY) resume(warp * 32 + lane);
        } while (release_warp(warp * 32));
    } while (error.empty() && release_barrier());
}

}  // namespace

#ifndef WITHOUT_BARRIERS
void __syncthreads() { pause_in(AT_BARRIER); }
#endif

uint64_t exchange(uint32_t mask, uint64_t sent, int apart) {
    current->mask = mask;
    current->sent = sent;
    current->apart = apart;
    pause_in(IN_WARP);
    return current->received;
}

// What must be noticed.
KERNEL(leaves_before_barrier, Query) {
    if (s.items.num_items == 0 && threadIdx.x > 0) __syncthreads();
}

KERNEL(leaves_before_shuffle, Query) {
    if (s.items.num_items == 0 && threadIdx.x > 0) __shfl_xor_sync(WHOLE_WARP, 1.0f, 1);
}

// Run one kernel; returns what went wrong, or an empty string.
extern "C" const char *emulate(Kernel run, const void *with, unsigned grid, unsigned block,
                               uint64_t seed) {
    make_fibers(block);
    error.clear();
    kernel = run;
    argument = with;
    gridDim.x = grid;
    blockDim.x = block;
    Order order = {seed};
    std::vector<unsigned> blocks(grid);
    order.arrange(blocks);
    for (unsigned index : blocks) {
        blockIdx.x = index;
        run_block(order);
        if (!error.empty()) break;
    }
    return error.c_str();
}
