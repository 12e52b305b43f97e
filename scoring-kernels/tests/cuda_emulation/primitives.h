// The instructions of primitives.cuh by their documented meaning, and where it leaves room by the worst that is allowed.
#pragma once
#include "processor.h"

static float widen(f16 bits) {
    u32 exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                 : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                 : std::ldexp(static_cast<float>(mantissa + 1024), static_cast<int>(exponent) - 25);
    return bits >> 15 != 0 ? -size : size;
}

static const std::vector<float> widened = [] {
    std::vector<float> all(1 << 16);
    for (u32 k = 0; k < all.size(); ++k) all[k] = widen(static_cast<f16>(k));
    return all;
}();

static float from_half(f16 bits) {
    return widened[bits];
}

static f16 to_half(float value) {
    f16 sign = std::signbit(value) ? 0x8000 : 0;
    double size = std::fabs(static_cast<double>(value));
    if (std::isnan(value)) return 0x7fff;
    if (size >= 65520.0) return sign | 0x7c00;
    int exponent = size == 0 ? -14 : std::max(std::ilogb(size), -14);
    // Rounds to even, as the CPU does by default.
    u32 mantissa = static_cast<u32>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return static_cast<f16>(sign + (static_cast<u32>(exponent + 14) << 10) + mantissa);
}

static float exp2_fast(float x) {
    float exact = std::exp2(x);
    return exact < 1.17549435e-38f ? 0.0f : exact * (1.0f + 2.4e-7f);
}

// Sums of eight products and what was there, as tensor cores make them: every term is cut off at the last bit of the
// largest, and so is the sum.
static float cut_sum(float sum, const float* products) {
    float most = std::fabs(sum);
    for (int k = 0; k < 8; ++k) most = std::max(most, std::fabs(products[k]));
    if (!(most < 1e30f)) {
        for (int k = 0; k < 8; ++k) sum += products[k];
        return sum;
    }
    if (most < 1e-30f) return 0;
    u32 bits;
    std::memcpy(&bits, &most, 4);
    // Powers of two by their exponents: what the last bit of the largest is worth, and one over it.
    u32 exponent = bits >> 23, unit_bits = (exponent - 23) << 23, units_bits = (277 - exponent) << 23;
    float unit, units;
    std::memcpy(&unit, &unit_bits, 4);
    std::memcpy(&units, &units_bits, 4);
    int total = static_cast<int>(sum * units);
    for (int k = 0; k < 8; ++k) total += static_cast<int>(products[k] * units);
    int size = std::abs(total), dropped = 0;
    for (; size >> dropped >= 1 << 24; ++dropped) {}
    size = size >> dropped << dropped;
    return (total < 0 ? -1.0f : 1.0f) * static_cast<float>(size) * unit;
}

static float half_of(u32 pair, u32 which) {
    return from_half(static_cast<f16>(pair >> (16 * which)));
}

// Where the documentation's figures put the values of the fragments of mma.m16n8k16.
static void multiply_warp(Thread* lanes) {
    float a[16][16], b[8][16], c[16][8];
    for (u32 l = 0; l < WARP; ++l) {
        u32 group = l / 4, in_group = l % 4;
        const u32* as = static_cast<const u32*>(lanes[l].in[0]);
        const u32* bs = static_cast<const u32*>(lanes[l].in[1]);
        const float* cs = static_cast<const float*>(lanes[l].out);
        for (u32 i = 0; i < 8; ++i) {
            u32 row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
            a[row][in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)] = half_of(as[i / 2], i & 1);
        }
        for (u32 i = 0; i < 4; ++i) b[group][in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)] = half_of(bs[i / 2], i & 1);
        for (u32 i = 0; i < 4; ++i) c[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = cs[i];
    }
    for (u32 i = 0; i < 16; ++i) {
        for (u32 j = 0; j < 8; ++j) {
            float products[16];
            for (u32 k = 0; k < 16; ++k) products[k] = a[i][k] * b[j][k];
            c[i][j] = cut_sum(cut_sum(c[i][j], products), products + 8);
        }
    }
    for (u32 l = 0; l < WARP; ++l) {
        float* cs = static_cast<float*>(lanes[l].out);
        for (u32 i = 0; i < 4; ++i) cs[i] = c[i < 2 ? l / 4 : l / 4 + 8][l % 4 * 2 + (i & 1)];
    }
}

static void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    Thread& me = processor.threads[processor.current];
    me.in[0] = a, me.in[1] = b, me.out = c;
    together(multiply_warp);
}

static void check_shared(const void* at) {
    uintptr_t from = reinterpret_cast<uintptr_t>(shared_memory), address = reinterpret_cast<uintptr_t>(at);
    if (address < from || address + 16 > from + SHARED_BYTES) fail("beyond shared memory");
    if (address % 16 != 0) fail("not aligned in shared memory");
}

static void load_matrices(u32 (&to)[4], const void* row) {
    check_shared(row);
    Thread& me = processor.threads[processor.current];
    me.in[0] = row, me.out = to;
    together([](Thread* lanes) {
        // Eight rows of a matrix must be in different banks, or the load takes several times as long.
        for (u32 matrix = 0; matrix < 4; ++matrix) {
            u32 banks = 0;
            for (u32 l = 0; l < 8; ++l) banks |= 1u << (reinterpret_cast<uintptr_t>(lanes[8 * matrix + l].in[0]) / 16 % 8);
            if (banks != 255) fail("rows of a matrix share a bank");
        }
        for (u32 l = 0; l < WARP; ++l) {
            for (u32 matrix = 0; matrix < 4; ++matrix) {
                const char* from = static_cast<const char*>(lanes[8 * matrix + l / 4].in[0]);
                std::memcpy(static_cast<u32*>(lanes[l].out) + matrix, from + l % 4 * 4, 4);
            }
        }
    });
}

static void copy_later(void* to, const void* from) {
    check_shared(to);
    uintptr_t address = reinterpret_cast<uintptr_t>(from);
    auto after = processor.memory->upper_bound(address);
    if (after == processor.memory->begin()) fail("a copy from outside device memory");
    auto [start, bytes] = *std::prev(after);
    if (address + 16 > start + bytes) fail("a copy from outside device memory");
    if (address % 16 != 0) fail("a copy from an address that is not aligned");
    if (processor.eager) {
        std::memcpy(to, from, 16);
    } else {
        processor.threads[processor.current].copies.groups.back().push_back({to, from});
    }
}

static void end_copies() {
    processor.threads[processor.current].copies.groups.emplace_back();
}

template <int N> static void wait_for_copies() {
    auto& groups = processor.threads[processor.current].copies.groups;
    while (groups.size() > N + 1) {
        for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}
