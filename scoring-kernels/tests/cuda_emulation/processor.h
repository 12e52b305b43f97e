// One multiprocessor on the CPU: runs a block of a kernel, thread by thread, so that the kernels' own source can be tested
// where there is no GPU. Threads are coroutines. They switch only where the source makes them wait for each other, in an
// order that changes from block to block, and a block whose threads wait for each other for ever is an error.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short f16;

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

constexpr u32 WARP = 32;
constexpr size_t SHARED_BYTES = 128 << 10, STACK_BYTES = 128 << 10;
// The block's shared memory, under the name that the kernels give it.
alignas(128) unsigned char shared_memory[SHARED_BYTES];

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulation: %s\n", what);
    std::abort();
}

struct Index {
    u32 x = 0, y = 0, z = 0;
};

// Copies that were started and may not have come yet.
struct Copies {
    struct Copy {
        void* to;
        const void* from;
    };
    std::vector<std::vector<Copy>> groups{1};
};

struct Thread {
    Index index;
    jmp_buf at;
    ucontext_t start;
    bool started;
    Copies copies;
    // What the thread brings to its warp's operation, and where it wants the result.
    const void* in[3];
    void* out;
};

struct Processor {
    std::vector<Thread> threads;
    std::vector<std::vector<char>> stacks;
    std::vector<u32> warp_arrived;
    std::deque<u32> ready;
    u32 current = 0, finished = 0, arrived = 0;
    Index block;
    ucontext_t outside;
    std::function<void()> body;
    // Whether copies come at once, or as late as the source allows.
    bool eager = false;
    // Device memory, by address: what is copied must lie in it.
    const std::map<uintptr_t, size_t>* memory = nullptr;
};
static Processor processor;

#define threadIdx (processor.threads[processor.current].index)
#define blockIdx (processor.block)

// Leaves the current thread until it is ready again.
__attribute__((noinline)) static void leave() {
    Thread& from = processor.threads[processor.current];
    if (processor.ready.empty()) fail("all threads wait for each other");
    if (_setjmp(from.at) != 0) return;
    processor.current = processor.ready.front();
    processor.ready.pop_front();
    Thread& to = processor.threads[processor.current];
    if (to.started) _longjmp(to.at, 1);
    to.started = true;
    setcontext(&to.start);
}

static void entry() {
    processor.body();
    if (++processor.finished == processor.threads.size()) setcontext(&processor.outside);
    leave();
}

// Runs one block of `count` threads.
inline void run_block(Index block, u32 count, std::function<void()> body) {
    Processor& p = processor;
    p.threads.assign(count, {});
    p.stacks.resize(count);
    p.warp_arrived.assign(count / WARP, 0);
    p.block = block, p.body = std::move(body), p.finished = p.arrived = 0, p.eager = (block.x + block.y) % 2 == 1;
    std::memset(shared_memory, 0xff, SHARED_BYTES);
    for (u32 k = 0; k < count; ++k) {
        p.stacks[k].resize(STACK_BYTES);
        Thread& thread = p.threads[k];
        thread.index.x = k;
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = p.stacks[k].data();
        thread.start.uc_stack.ss_size = STACK_BYTES;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, entry, 0);
        if (p.eager) p.ready.push_front(k); else p.ready.push_back(k);
    }
    volatile bool begun = false;
    getcontext(&p.outside);
    if (begun) {
        if (!p.ready.empty()) fail("a thread is ready after the end");
        return;
    }
    begun = true;
    p.current = p.ready.front();
    p.ready.pop_front();
    p.threads[p.current].started = true;
    setcontext(&p.threads[p.current].start);
}

static void __syncthreads() {
    Processor& p = processor;
    if (++p.arrived < p.threads.size()) return leave();
    p.arrived = 0;
    for (u32 k = 0; k < p.threads.size(); ++k) {
        u32 woken = p.eager ? p.threads.size() - 1 - k : k;
        if (woken != p.current) p.ready.push_back(woken);
    }
}

// Has the last lane that comes do an operation for the whole warp.
template <class Operation> static void together(Operation operation) {
    Processor& p = processor;
    u32 warp = p.current / WARP;
    if (++p.warp_arrived[warp] < WARP) return leave();
    p.warp_arrived[warp] = 0;
    operation(&p.threads[warp * WARP]);
    for (u32 k = warp * WARP; k < (warp + 1) * WARP; ++k) {
        if (k != p.current) p.ready.push_front(k);
    }
}

template <class T> static T __shfl_xor_sync(u32 mask, T value, u32 with) {
    if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
    T result;
    Thread& me = processor.threads[processor.current];
    me.in[0] = &value, me.out = &result;
    together([with](Thread* lanes) {
        for (u32 l = 0; l < WARP; ++l) *static_cast<T*>(lanes[l].out) = *static_cast<const T*>(lanes[l ^ with].in[0]);
    });
    return result;
}

static u32 min(u32 a, u32 b) {
    return a < b ? a : b;
}
