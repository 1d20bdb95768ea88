// AVX-512's integer vectors for the INT4 linear: 16 outputs by 4 channels.
//
// Without VNNI as AVX2 does it; with VNNI, vpdpbusd adds four products into 32 bits, modulo 2^32.

#pragma once

#include "isa/vectors_x86.h"

namespace {

// What both have in common.
struct Avx512Vectors : X86<16> {
    static constexpr int outputs = 16, panels = 2, registers = 32;

    using Weights = __m512i;
    using Sums = __m512i;

    static Weights load(const uint8_t *from) { return _mm512_loadu_si512(from); }

    static void store(Weights weights, uint8_t *to) { _mm512_storeu_si512(to, weights); }

    static Weights low(Weights both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }

    static Weights high(Weights both) { return low(_mm512_srli_epi16(both, 4)); }

    static Sums zero() { return _mm512_setzero_si512(); }

    static __m512i broadcast(const int8_t *activations)
    {
        return _mm512_set1_epi32(four_channels(activations));
    }

    static void keep_order(__m512i &sums) { __asm__("" : "+v"(sums)); }

    template <bool Replace> static void store_sums(__m512i sums, int32_t *to)
    {
        if (!Replace)
            sums = _mm512_add_epi32(_mm512_loadu_si512(to), sums);
        _mm512_storeu_si512(to, sums);
    }
};

#if defined(__AVX512VNNI__)

struct Avx512Vnni : Avx512Vectors {
    // vpdpbusd takes weights without a sign.
    static constexpr bool whole_bytes = true;
    static constexpr int32_t byte_offset = 128;
    // 28 sums, 2 vectors of weights, one of activations, one mask: all registers.
    static constexpr int rows = 14;

    static int64_t run(int) { return INT64_MAX; }

    template <int Rows>
    static Sums step(Sums sums, Weights weights, const int8_t *activations, int row)
    {
        sums = _mm512_dpbusd_epi32(sums, weights, broadcast(activations + 4 * row));
        keep_order(sums);
        return sums;
    }

    template <bool Replace> static void widen(Sums sums, int32_t *to)
    {
        store_sums<Replace>(sums, to);
    }
};

#else

struct Avx512 : Avx512Vectors {
    static constexpr bool whole_bytes = false;
    static constexpr int rows = 12;

    // As AVX2's: 240 or 3840 a step.
    static int64_t run(int activation_bits) { return activation_bits == 8 ? 4 : 68; }

    template <int Rows>
    static Sums step(Sums sums, Weights weights, const int8_t *activations, int row)
    {
        const __m512i four = broadcast(activations + 4 * row);
        sums = _mm512_add_epi16(sums, _mm512_maddubs_epi16(weights, four));
        keep_order(sums);
        return sums;
    }

    template <bool Replace> static void widen(Sums sums, int32_t *to)
    {
        store_sums<Replace>(_mm512_madd_epi16(sums, _mm512_set1_epi16(1)), to);
    }
};

#endif

}  // namespace
