// The processor's instructions that the kernels use, one in each function. An emulation on the CPU
// has functions of the same names and of the documented meaning in their place; see the PTX ISA's
// chapters on mma, ldmatrix, cp.async and ex2.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
// The bits of an IEEE half.
typedef unsigned short f16;

// c += a x b: a is 16 x 16, b 16 x 8 in halves, c 16 x 8 in floats, spread over the warp's 32
// lanes. Lane l has of c the columns 2 (l mod 4) and the next, of rows l / 4 (c[0], c[1]) and l / 4
// + 8 (c[2], c[3]).
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of halves from shared memory. Lane l gives the address of row l mod 8 of
// matrix l / 8, 16 bytes, and gets of each matrix the columns 2 (l mod 4) and the next of row l /
// 4.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], const void* row) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// Starts to copy 16 bytes from global to shared memory, both aligned.
__device__ __forceinline__ void copy_later(void* to, const void* from) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

// Ends a group of copies of this thread, which may be empty.
__device__ __forceinline__ void end_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the last N groups of this thread are unfinished.
template <int N> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2^x, to 2^-22 of its value; 0 for x far below 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The nearest half, and its value.
__device__ __forceinline__ f16 to_half(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float from_half(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
